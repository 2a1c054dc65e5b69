"""Hymba for transformers: importing this module registers `model_type: hymba` with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hymba_align.model.branches import without_branch
from hymba_align.model.cache import HymbaCache
from hymba_align.model.configuration import HymbaConfig
from hymba_align.model.modeling import HymbaForCausalLM, HymbaModel
from hymba_align.model.segments import SegmentTree

AutoConfig.register(HymbaConfig.model_type, HymbaConfig, exist_ok=True)
AutoModel.register(HymbaConfig, HymbaModel, exist_ok=True)
AutoModelForCausalLM.register(HymbaConfig, HymbaForCausalLM, exist_ok=True)

__all__ = ["HymbaCache", "HymbaConfig", "HymbaForCausalLM", "HymbaModel", "SegmentTree", "without_branch"]
