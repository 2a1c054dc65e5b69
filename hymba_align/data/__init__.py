"""Data: sources, schemas, conversion to conversations, the chat template, and the shipped samples."""
