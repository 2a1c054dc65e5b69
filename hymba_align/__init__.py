"""Fine-tuning and alignment for Hymba, NVIDIA's hybrid-head language model.

Importing this package stays light: `import hymba_align.model` registers the model with transformers.
"""

__version__ = "0.1.0"
