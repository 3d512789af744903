"""What sluice needs of transformers, found by looking: one function per fact, each a JSON value.

`facts()` is compared with the recording of the installed release, so that a release which moves
something says what it moved. Facts that must hold on every release are asserted beside it.
"""

from __future__ import annotations

import ast
import inspect
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig

import sluice
from sluice.hf import compat

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
CHECKS: dict[str, Callable[[], Any]] = {}


def check(function: Callable[[], Any]) -> Callable[[], Any]:
    CHECKS[function.__name__] = function
    return function


def facts() -> dict[str, Any]:
    return {name: function() for name, function in CHECKS.items()}


def tiny_model(config: Any = None) -> Any:
    torch.manual_seed(0)
    config = config or MixtralConfig(
        **TINY, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2
    )
    return AutoModelForCausalLM.from_config(config).eval()


def parameters_of(function: Any) -> list[str]:
    return [str(p).split(":")[0].split("=")[0].strip() for p in signature(function).values()]


def signature(function: Any) -> Any:
    return inspect.signature(function).parameters


@check
def decorator_flags() -> dict[str, Any]:
    from transformers.integrations.moe import use_experts_implementation

    return {
        name: p.default
        for name, p in signature(use_experts_implementation).items()
        if isinstance(p.default, bool)
    }


@check
def built_in_experts_functions() -> dict[str, list[str]]:
    registry = compat.experts_functions()
    names = [name for name in registry if name != "sluice"]
    return {name: parameters_of(registry[name]) for name in sorted(names)}


@check
def rename_source_key_parameters() -> list[str]:
    from transformers.core_model_loading import rename_source_key

    return parameters_of(rename_source_key)


@check
def conversion_operations() -> dict[str, list[str]]:
    """Attributes of the operations whose chains become byte ranges."""
    from transformers import core_model_loading as loading

    operations = {
        "MergeModulelist": loading.MergeModulelist(dim=0),
        "Concatenate": loading.Concatenate(dim=1),
        "Transpose": loading.Transpose(1, 2, check_dims=True),
    }
    return {name: sorted(vars(operation)) for name, operation in operations.items()}


@check
def quantizer_hooks() -> dict[str, list[str]]:
    from transformers.quantizers import HfQuantizer

    names = (
        "_process_model_before_weight_loading",
        "_process_model_after_weight_loading",
        "preprocess_model",
        "postprocess_model",
        "remove_quantization_config",
        "validate_environment",
    )
    return {name: parameters_of(getattr(HfQuantizer, name)) for name in names}


@check
def registration() -> dict[str, str]:
    """Decorators demand subclasses and refuse a second time."""
    from transformers.quantizers import register_quantization_config, register_quantizer

    assert sluice.OffloadConfig  # registers
    tries = {
        "config that is no subclass": lambda: register_quantization_config("sluice_probe")(int),
        "quantizer that is no subclass": lambda: register_quantizer("sluice_probe")(int),
        "config twice": lambda: register_quantization_config("sluice_offload")(int),
        "quantizer twice": lambda: register_quantizer("sluice_offload")(int),
    }
    return {name: _error_of(attempt) for name, attempt in tries.items()}


@check
def kwargs_before_loading() -> list[str]:
    """What reaches the quantizer while the model is on meta."""
    from sluice.hf.quantizer import OffloadHfQuantizer

    seen: list[str] = []
    original = OffloadHfQuantizer._process_model_before_weight_loading

    def watch(self: Any, model: Any, **kwargs: Any) -> None:
        seen.extend(sorted(kwargs))
        assert all(p.device.type == "meta" for p in model.parameters())
        original(self, model, **kwargs)

    OffloadHfQuantizer._process_model_before_weight_loading = watch
    try:
        _load(per_expert=True)
    finally:
        OffloadHfQuantizer._process_model_before_weight_loading = original
    return seen


@check
def expert_reads_while_loading() -> dict[str, Any]:
    """A key without a parameter is listed under its new name and never read."""
    return {style: _reads(per_expert=style == "per_expert") for style in ("per_expert", "fused")}


@check
def loaded_model() -> dict[str, Any]:
    model = _load(per_expert=True)
    return {
        "hf_quantizer": hasattr(model, "hf_quantizer"),
        "is_quantized": model.is_quantized,
        "quantization_config": "quantization_config" in model.config.to_dict(),
        "_is_quantized": hasattr(model.config, "_is_quantized"),
        "_weight_conversions": bool(getattr(model, "_weight_conversions", None)),
        "ignore_keys_type": type(model._keys_to_ignore_on_load_unexpected).__name__,
        "implementation": model.config._experts_implementation,
        "saved config names it": "sluice" in model.config.to_json_string(),
    }


@check
def decode_toggle() -> dict[str, int]:
    """How often a decode loop off the CPU switches implementations, stock and offloaded."""
    return {"stock": _toggles(tiny_model()), "offloaded": _toggles(_load(per_expert=True))}


@check
def disabled_compile_is_honoured() -> bool:
    from transformers.generation import utils

    source = inspect.getsource(utils.GenerationMixin)
    return "generation_config.disable_compile" in source


@check
def cache_keyword() -> str:
    parameters = inspect.signature(type(tiny_model()).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


@check
def has_get_experts_implementation() -> bool:
    return hasattr(transformers.PreTrainedModel, "get_experts_implementation")


@check
def experts_without_implementation() -> str:
    """The default for a decorated family, and that ours is no default."""
    return str(tiny_model().config._experts_implementation)


@check
def mixtral_router() -> list[str]:
    """Outputs of a router, by type: the one integer tensor is the choice."""
    model = tiny_model()
    with torch.no_grad():
        outputs = model.model.layers[0].mlp.gate(torch.randn(5, 32))
    return [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in outputs]


@check
def experts_call() -> list[str]:
    """What a block hands its experts."""
    seen: list[str] = []
    model = tiny_model(
        Qwen2MoeConfig(
            **TINY,
            intermediate_size=48,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=32,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )
    module = model.model.layers[0].mlp.experts
    module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.extend(
            [f"{str(a.dtype).removeprefix('torch.')}[{a.ndim}-D]" for a in args] + sorted(kwargs)
        ),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    return seen


@check
def experts_classes() -> dict[str, Any]:
    """AST scan of the family files: decorated classes by flags, and the others by name."""
    decorated: Counter[str] = Counter()
    bare: list[str] = []
    for file, node in _experts_nodes():
        flags = _decorator_flags_of(node)
        if flags is None:
            bare.append(f"{file.parent.name}.{node.name}")
        else:
            decorated[flags or "standard"] += 1
    return {"decorated": dict(sorted(decorated.items())), "undecorated": sorted(bare)}


@check
def a_failed_load_leaves_nothing_behind() -> bool:
    """A load that fails on the way leaves nothing behind: the next one works."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_model().save_pretrained(folder)
        config = sluice.OffloadConfig(device_memory="25%", exclude=["experts"])
        try:
            AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        except sluice.UnsupportedModelError:
            return AutoModelForCausalLM.from_pretrained(folder) is not None
    return False


def _experts_nodes() -> Iterator[tuple[Path, ast.ClassDef]]:
    root = Path(transformers.__file__).parent / "models"
    for file in sorted(root.glob("*/modeling_*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Experts"):
                yield file, node


def _decorator_flags_of(node: ast.ClassDef) -> str | None:
    for decorator in node.decorator_list:
        call = decorator if isinstance(decorator, ast.Call) else None
        if getattr(call.func if call else decorator, "id", "") == "use_experts_implementation":
            given = [f"{k.arg}={ast.unparse(k.value)}" for k in call.keywords] if call else []
            return ", ".join(sorted(given))
    return None


def _load(*, per_expert: bool, **kwargs: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        tiny_model().save_pretrained(folder, save_original_format=per_expert)
        config = sluice.OffloadConfig(device_memory="50%")
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **kwargs)


def _reads(*, per_expert: bool) -> dict[str, Any]:
    import transformers.core_model_loading as loading

    read: list[Any] = []
    original = loading._materialize_copy

    def watch(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        read.append(list(tensor.get_shape()))
        return original(tensor, *args, **kwargs)

    loading._materialize_copy = watch
    try:
        _, info = _load(per_expert=per_expert, output_loading_info=True)
    finally:
        loading._materialize_copy = original
    return {
        "expert tensors read": sum(1 for shape in read if 48 in shape or len(shape) > 2),
        "dense tensors read": len(read),
        "unexpected": sorted(info["unexpected_keys"]),
        "missing": sorted(info["missing_keys"]),
    }


def _toggles(model: Any) -> int:
    calls: list[Any] = []
    kind = type(model)
    original = kind.set_experts_implementation
    kind.set_experts_implementation = lambda self, name: calls.append(name)
    kind.device = property(lambda self: torch.device("meta"))  # any that is not the CPU
    try:
        with model._optimize_model_for_decode():
            pass
    finally:
        kind.set_experts_implementation = original
        del kind.device
    return len(calls)


def _error_of(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except Exception as error:
        return type(error).__name__
    return "accepted"
