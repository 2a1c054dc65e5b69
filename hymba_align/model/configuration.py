"""Hymba's configuration: the keys of the released `config.json`, read, checked and written back.

Keys fall into three groups: those that shape the computation are fields of `HymbaConfig`; those that have a single
meaning in every released checkpoint are accepted with that value only (`FIXED`); those that mean nothing here
(kernel choices, unused router settings) are carried from the file that was read to the file that is written.

The one module without postponed annotations: `strict` checks the types of values, and with names in place of types it
would let everything pass.
"""

from dataclasses import fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

REMOTE_CODE = "nvidia/Hymba-1.5B-Base"
"""The hub repository that holds the released modeling code: what we write opens there too."""

RELEASED_CLASSES = {
    "AutoConfig": f"{REMOTE_CODE}--configuration_hymba.HymbaConfig",
    "AutoModelForCausalLM": f"{REMOTE_CODE}--modeling_hymba.HymbaForCausalLM",
}
"""`auto_map` of what we write, with the repository, so that it resolves from any folder. A checkpoint's own is not kept."""

RELEASED_ATTENTION = "flex"
"""`attn_implementation` in released files: a choice of the released code, not one of transformers'."""

FIXED: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0.0,),
    "attn_hidden_size": (-1,),
    "hidden_act": ("silu",),
    "kq_head_dim": (-1,),
    "kq_norm": ("none", None),
    "kv_reuse_every_i_layer": (-1,),
    "kv_weight_reuse": (False,),
    "mamba_conv_bias": (True,),
    "mamba_inner_layernorms": (True,),
    "mamba_proj_bias": (False,),
    "memory_tokens_interspersed_every": (0,),
    "mlp_hidden_act": ("silu",),
    "num_experts": (1,),
    "num_experts_per_tok": (1,),
    "num_mamba": (1,),
    "rope": (True,),
}
"""Released keys with the values that are implemented; the first one is written where none was read."""

CARRIED: dict[str, Any] = {
    "attn_implementation_new": "flex",
    "calc_logits_for_entire_prompt": False,
    "conv_dim": None,
    "layer_type": None,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "seq_length": None,
    "use_mamba_kernels": True,
}
"""Released keys without a meaning here. `output_router_logits` beside `router_aux_loss_coef` would even make TRL
look for a mixture-of-experts loss, so they are kept out of the attributes."""

LIMITS: dict[str, tuple[int, int]] = {
    "vocab_size": (1, 1 << 22),
    "hidden_size": (1, 1 << 16),
    "intermediate_size": (1, 1 << 18),
    "num_hidden_layers": (1, 512),
    "num_attention_heads": (1, 1024),
    "num_key_value_heads": (1, 1024),
    "v_head_dim": (1, 1 << 16),
    "num_memory_tokens": (1, 1 << 16),
    "sliding_window": (1, 1 << 30),
    "mamba_expand": (1, 64),
    "mamba_d_state": (1, 4096),
    "mamba_d_conv": (2, 64),
    "mamba_dt_rank": (1, 1 << 16),
    "max_position_embeddings": (1, 1 << 30),
    "orig_max_position_embeddings": (1, 1 << 30),
}
"""Smallest and largest value of each size, far above any released model: a size that only a damaged or hostile file has."""

RANGES: dict[str, tuple[float, float]] = {
    "rope_theta": (1.0, 1e12),
    "rms_norm_eps": (1e-30, 1.0),
    "initializer_range": (0.0, 100.0),
}
"""Smallest and largest value of each real number; NaN is in none."""

TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
DTYPES = ("float32", "bfloat16", "float16", "float64")


@strict
class HymbaConfig(PreTrainedConfig):
    """Shape of a Hymba model; the defaults are Hymba-1.5B's.

    Args:
        vocab_size: V.
        hidden_size: D.
        intermediate_size: width of the MLP.
        num_hidden_layers: layers.
        num_attention_heads: H query heads; the query/key head size is D / H.
        num_key_value_heads: G key/value heads.
        v_head_dim: value head size, mamba_expand * D / H, so that attention is as wide as the SSM.
        num_memory_tokens: M learned meta tokens in front of every sequence.
        sliding_window: largest distance between query and key in local layers; meta tokens are always seen.
        global_attn_idx: layers without a window.
        kv_reuse_group: groups of layers that share the first one's keys and values.
        mamba_expand: I / D.
        mamba_d_state: N.
        mamba_d_conv: taps of the causal convolution.
        mamba_dt_rank: rank of the step-size projection.
        rope_type: "ntk" for the released NTK-aware base, None for plain rotary embeddings.
        max_position_embeddings: context in text tokens; enters the NTK base.
        orig_max_position_embeddings: context before the extension; enters the NTK base.

    Raises:
        ValueError: a value that no released checkpoint uses and that is not implemented, or a contradiction.
    """

    model_type = "hymba"
    keys_to_ignore_at_inference = ("past_key_values",)
    # TRL's path-string loading looks for it on the class; see TRL's create_model_from_path.
    auto_map: ClassVar[dict[str, str]] = {}

    vocab_size: int = 32001
    hidden_size: int = 1600
    intermediate_size: int = 5504
    num_hidden_layers: int = 32
    num_attention_heads: int = 25
    num_key_value_heads: int = 5
    v_head_dim: int = 128
    num_memory_tokens: int = 128
    sliding_window: int = 1024
    global_attn_idx: list[int] | tuple[int, ...] = (0, 15, 31)
    kv_reuse_group: list[list[int]] | tuple[tuple[int, ...], ...] = (
        *((i, i + 1) for i in range(1, 15, 2)),
        (16, 17, 18),
        *((i, i + 1) for i in range(19, 31, 2)),
    )
    mamba_expand: int = 2
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_dt_rank: int = 100
    rope_type: str | None = "ntk"
    rope_theta: float | int = 10000.0
    max_position_embeddings: int = 8192
    orig_max_position_embeddings: int = 2048
    rms_norm_eps: float | int = 1e-6
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        released = {key: kwargs.pop(key, values[0]) for key, values in FIXED.items()}
        released |= {key: kwargs.pop(key) for key in CARRIED if key in kwargs}
        if kwargs.get("attn_implementation") == RELEASED_ATTENTION:
            del kwargs["attn_implementation"]
        self.global_attn_idx = list(self.global_attn_idx)
        self.kv_reuse_group = [list(group) for group in self.kv_reuse_group]
        kwargs.pop("auto_map", None)  # another's code would otherwise be named in what we write
        self._check_dtype(kwargs.get("torch_dtype"))
        super().__post_init__(**kwargs)
        defaults = {"attn_implementation": RELEASED_ATTENTION, "seq_length": self.max_position_embeddings}
        self._released = {**CARRIED, **defaults, **released}
        self._released["auto_map"] = dict(RELEASED_CLASSES)
        self._check_fixed(released)
        self._check_ranges()
        self._check_shape()
        self._check_layers()

    @property
    def inner_size(self) -> int:
        """I, the width of both branches."""
        return self.mamba_expand * self.hidden_size

    @property
    def head_dim(self) -> int:
        """Query/key head size."""
        return self.hidden_size // self.num_attention_heads

    def is_global(self, layer: int) -> bool:
        """Whether the layer's attention has no window."""
        return layer in self.global_attn_idx

    def kv_source(self, layer: int) -> int:
        """The layer whose keys and values `layer` uses: itself, or the first of its reuse group."""
        return next((group[0] for group in self.kv_reuse_group if layer in group), layer)

    def to_dict(self) -> dict[str, Any]:
        """All keys, the carried ones included."""
        output = super().to_dict()
        released = output.pop("_released")
        return output | {key: value for key, value in released.items() if value is not None}

    def to_diff_dict(self) -> dict[str, Any]:
        """What `config.json` holds, under the names that the released code reads."""
        output = super().to_diff_dict()
        if (dtype := output.pop("dtype", None)) is not None:
            output["torch_dtype"] = dtype  # the released code predates the key `dtype`; transformers 5 reads both
        return output

    def _check_fixed(self, released: dict[str, Any]) -> None:
        for key, accepted in FIXED.items():
            given = released[key]
            if not any(given == one and isinstance(given, bool) == isinstance(one, bool) for one in accepted):
                raise ValueError(
                    f"HymbaConfig: {key} is {released[key]!r}, which no released checkpoint uses; only {accepted[0]!r} is supported"
                )
        kinds = self._released["layer_type"] or []
        if not isinstance(kinds, list) or any(kind != "h" for kind in kinds):
            raise ValueError("HymbaConfig: layer_type holds a kind other than 'h'; only hybrid layers are supported")
        if self.rope_type not in ("ntk", None):
            raise ValueError(f"HymbaConfig: rope_type is {self.rope_type!r}; only 'ntk' and None are supported")
        if not self.tie_word_embeddings:
            raise ValueError("HymbaConfig: tie_word_embeddings is False; released checkpoints tie the head")

    def _check_dtype(self, old_name: Any) -> None:
        """Before the base class looks the name up among all that torch has."""
        for name in (self.dtype, old_name):
            if name is not None and str(name).removeprefix("torch.") not in DTYPES:
                raise ValueError(f"HymbaConfig: dtype is {name!r:.60}; it must be one of {', '.join(DTYPES)}")

    def _check_ranges(self) -> None:
        for key, (least, most) in (LIMITS | RANGES).items():
            value = getattr(self, key)
            if not least <= value <= most:
                must = f"at least {least}" if value < least else f"at most {most}" if value > most else "a number"
                raise ValueError(f"HymbaConfig: {key} is {value}; it must be {must}")
        if self.rope_type == "ntk" and 2 * self.max_position_embeddings <= self.orig_max_position_embeddings:
            raise ValueError(
                f"HymbaConfig: rope_type 'ntk' cannot shrink a context of {self.orig_max_position_embeddings} "
                f"(orig_max_position_embeddings) to {self.max_position_embeddings} (max_position_embeddings); "
                "use more than half of it, or rope_type None"
            )
        for key in TOKEN_IDS:
            value = getattr(self, key)
            for token in value if isinstance(value, list) else [] if value is None else [value]:
                if not 0 <= token < self.vocab_size:
                    raise ValueError(
                        f"HymbaConfig: {key} is {token}; it must lie between 0 and {self.vocab_size - 1} (vocab_size - 1)"
                    )

    def _check_shape(self) -> None:
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2 or self.head_dim < 4:
            raise ValueError(
                f"HymbaConfig: hidden_size {self.hidden_size} over num_attention_heads {self.num_attention_heads} "
                "must give an even head size of at least 4"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"HymbaConfig: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.v_head_dim * self.num_attention_heads != self.inner_size:
            raise ValueError(
                f"HymbaConfig: v_head_dim is {self.v_head_dim}; with mamba_expand {self.mamba_expand} and "
                f"hidden_size {self.hidden_size} it must be {self.inner_size / self.num_attention_heads:g}"
            )

    def _check_layers(self) -> None:
        layers = range(self.num_hidden_layers)
        if len(set(self.global_attn_idx)) < len(self.global_attn_idx):
            raise ValueError("HymbaConfig: global_attn_idx names a layer twice")
        for layer in self.global_attn_idx:
            if layer not in layers:
                raise ValueError(f"HymbaConfig: global_attn_idx names layer {layer}; there are {len(layers)} layers")
        seen: set[int] = set()
        for group in self.kv_reuse_group:
            if len(group) < 2 or group != sorted(set(group)) or not set(group) <= set(layers):
                raise ValueError(
                    f"HymbaConfig: kv_reuse_group {group} must list two or more layers between 0 and {len(layers) - 1}, in order"
                )
            if seen & set(group):
                raise ValueError(f"HymbaConfig: layer {min(seen & set(group))} is in two groups of kv_reuse_group")
            if len({self.is_global(layer) for layer in group}) > 1:
                raise ValueError(f"HymbaConfig: kv_reuse_group {group} mixes global and local layers")
            seen |= set(group)


CONFIG_KEYS = frozenset(
    {field.name for field in fields(HymbaConfig)} - {field.name for field in fields(PreTrainedConfig)}
    | FIXED.keys()
    | CARRIED.keys()
    | {"architectures", "attn_implementation", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version"}
)
"""Every key that a Hymba's config.json has a use for. transformers reads more: some name other files, code or kernels."""
