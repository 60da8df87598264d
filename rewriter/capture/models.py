"""What is planned: a model and its inputs, from a factory, a Hugging Face config (no weights), or an exported program."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...cost_model.json import Read
from ...cost_model.words import bytes_text
from ...patterns.evaluate import DTYPE
from ..graph.torch_private import FakeTensorMode, tree_leaves, tree_map
from ..shapes import Shapes, UsageError, check_spec

_PLAIN = Shapes()
# Of transformers, which may be absent; an architecture's config has fields of its own.
Config: TypeAlias = Any


_DEFAULT_SEQ = 2048


@dataclass(frozen=True)
class ModelInput:
    """What is planned: a module with its inputs, or an exported program.

    `where` says what its tensors are: "meta", "fake", or "" for tensors with data.
    """

    name: str
    model: nn.Module | None
    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = field(default_factory=dict)
    program: torch.export.ExportedProgram | None = None
    where: str = ""
    note: str = ""


def load(spec: str, shapes: Shapes = _PLAIN, *, where: str = "meta") -> ModelInput:
    """What `spec` names. Raises UsageError with one sentence.

    A config's model has no weights where `where` is "meta" or "fake" (tensors that only say they are on the CPU, or with
    "fake:cuda" on that device, for code that mixes its inputs with tensors of its own), and random ones where it is "cpu".
    `spec` is `package.module:factory` (returns a module, or a module with its args and kwargs), the path of a
    `config.json` or of a folder that holds one, or the path of a `.pt2`.
    """
    check_spec(spec, shapes)
    path = Path(spec)
    if path.is_dir() or path.suffix == ".json":
        return from_config(path / "config.json" if path.is_dir() else path, shapes, where)
    return _from_program(path) if path.suffix == ".pt2" else _from_factory(spec, shapes)


def _dtype(shapes: Shapes) -> torch.dtype | None:
    return DTYPE[shapes.short_dtype] if shapes.short_dtype is not None else None


# Weights, their copy in float64 while a site is held against it, and what runs.
_COPIES = 2


def check_memory(spec: str, shapes: Shapes) -> None:
    """Refuse a config whose model this machine has no memory for. Raises UsageError; nothing is built to find out."""
    if Path(spec).suffix != ".json" and not Path(spec).is_dir():
        return
    model = load(spec, shapes).model
    assert model is not None
    needed = _COPIES * sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise UsageError(
            f"{spec}: weights and what is compared with take {bytes_text(needed)}, {bytes_text(free)} are free here: "
            "give a config with fewer layers (num_hidden_layers), or a narrower --dtype"
        )


# --- factories and programs -------------------------------------------------------------------------------------


def _from_factory(spec: str, shapes: Shapes) -> ModelInput:
    module_name, _, attribute = spec.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(f"{spec}: cannot import {module_name} ({error}); run from the folder that holds it") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise UsageError(f"{spec}: {module_name} has no callable named {attribute or '(empty)'}")
    needed = _needed(factory)
    if needed:
        raise UsageError(f"{spec} needs an argument ({needed[0]!r}): name a function that takes none")
    try:
        made = factory()
    except Exception as error:
        # A user's function may raise anything; the sentence names it, --debug shows the rest.
        raise UsageError(f"{spec} raised {named(error)} (--debug shows where)") from error
    model, args, kwargs = _unpack(spec, made)
    if _dtype(shapes) is not None:
        model = model.to(_dtype(shapes))
        args, kwargs = tree_map(lambda x: _to(x, _dtype(shapes)), (args, kwargs))
    if not args and not kwargs:
        try:
            args, kwargs = inputs_for(model, shapes)
        except UsageError as no:
            raise UsageError(f"{spec}: {no}; a factory may return (module, args, kwargs)") from no
    elif ignored := [x for x in shapes.given() if x != "--dtype"]:
        raise UsageError(
            f"{spec} brings its own inputs, which {' and '.join(ignored)} would not change: leave it out, or have the "
            "factory return the module alone"
        )
    check_devices(model, args, kwargs)
    return ModelInput(spec, model, args, kwargs)


def _needed(function: Callable[..., object]) -> list[str]:
    """The arguments that a call must give; none where a function does not say."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return []
    return [n for n, p in parameters.items() if p.default is p.empty and p.kind in (0, 1, 3)]


def named(error: BaseException) -> str:
    """An error in one line: its type, and what it says."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def check_devices(model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
    """Inputs with elements to compute on lie where the model does (a scalar may lie on the CPU). Raises UsageError."""
    own = {p.device.type for p in model.parameters()}
    for t in tree_leaves((args, dict(kwargs))):
        if isinstance(t, Tensor) and len(own) == 1 and t.device.type not in own and t.dim() > 0:
            (there,) = own
            raise UsageError(
                f"an input of shape {tuple(t.shape)} is on {t.device.type}, the model is on {there}: move one of them"
            )


def run(model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    """What the model answers. Raises UsageError where its own code raises: these inputs are not for it."""
    try:
        return model(*args, **kwargs)
    except Exception as error:
        raise UsageError(f"{type(model).__name__} itself fails on these inputs ({named(error)}): change them") from error


def _unpack(spec: str, made: object) -> tuple[nn.Module, tuple[object, ...], dict[str, object]]:
    parts = made if isinstance(made, tuple) else (made,)
    model, args, kwargs = (*parts, (), {})[:3] if len(parts) == 1 else (*parts, {})[:3]
    if not isinstance(model, nn.Module) or len(parts) > 3 or not isinstance(kwargs, dict):
        raise UsageError(
            f"{spec} must return a torch module, or (module, args, kwargs); it returned {type(made).__name__}"
        )
    return model, args if isinstance(args, (tuple, list)) and not isinstance(args, Tensor) else (args,), kwargs  # type: ignore[return-value]


def _to(x: object, dtype: torch.dtype | None) -> object:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _from_program(path: Path) -> ModelInput:
    try:
        program = torch.export.load(path)
    except Exception as error:
        # A broken archive, or one of another version, raises whatever the reader met first.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"{path} is no exported program that PyTorch {torch.__version__} reads ({reason}): "
            "save it with torch.export.save under this version"
        ) from error
    return ModelInput(str(path), None, program=program)


# --- Hugging Face configs ---------------------------------------------------------------------------------------


def from_config(path: Path, shapes: Shapes, where: str = "meta") -> ModelInput:
    """A model of the config's architecture, and inputs of the asked shapes; `where` as in `load`."""
    kind, _, device = where.partition(":")
    with FakeTensorMode(allow_non_fake_inputs=True) if kind == "fake" else contextlib.nullcontext():
        model = build(path, shapes, "meta" if kind == "meta" else device or "cpu")
        made = decode_inputs(model, shapes) if shapes.phase == "decode" else inputs_for(model, shapes)
        return ModelInput(str(path), model, *made, where=kind, note=_sizes_note(made))


def _sizes_note(made: tuple[tuple[object, ...], dict[str, object]]) -> str:
    """The inputs that were built, so that a reader knows what was planned."""
    shown = {n: list(t.shape) for n, t in made[1].items() if isinstance(t, Tensor)}
    return "inputs: " + ", ".join(f"{n} {shape}" for n, shape in shown.items())


def build(path: Path, shapes: Shapes, where: str = "meta") -> nn.Module:
    """The config's model on a device, `meta` for none: the class from `architectures`, else AutoModel."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is no JSON file ({error})") from error
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise UsageError(f"{path} has no model_type: it is no Hugging Face config.json")
    if "auto_map" in raw:
        raise UsageError(
            f"{path} asks for remote code (auto_map), which is not run: import the class and give module:factory"
        )
    try:
        import transformers
    except ImportError as error:
        raise UsageError("a config.json needs transformers: pip install 'reattend[models]'") from error
    config = _config(transformers, path, raw)
    options: dict[str, object] = {"dtype": _dtype(shapes)} if _dtype(shapes) is not None else {}
    if shapes.attn is not None:
        options["attn_implementation"] = shapes.attn
    try:
        with torch.device(where):
            model = _model_class(transformers, path, raw, config)(config, **options)
    except UsageError:
        raise
    except Exception as error:
        # The model's own constructor: a size that does not divide, an implementation that it does not have, ...
        raise UsageError(f"{path}: the model cannot be built ({named(error)})") from error
    assert isinstance(model, nn.Module)
    return model.eval()


def _config(transformers: ModuleType, path: Path, raw: Read) -> Config:
    known = transformers.CONFIG_MAPPING
    if raw["model_type"] not in known:
        raise UsageError(
            f"{path}: transformers {transformers.__version__} knows no architecture {raw['model_type']!r}: "
            "upgrade it, or build the model yourself and give module:factory"
        )
    try:
        return known[raw["model_type"]].from_dict(raw)
    except Exception as error:
        raise UsageError(f"{path}: the config is not valid ({named(error)})") from error


def _model_class(transformers: ModuleType, path: Path, raw: Read, config: Config) -> Callable[..., object]:
    names = raw.get("architectures") or []
    for name in names:
        if hasattr(transformers, name):
            return getattr(transformers, name)._from_config  # type: ignore[no-any-return]
    if names:
        raise UsageError(
            f"{path}: transformers {transformers.__version__} has no class {names[0]}: upgrade it, or take architectures "
            "out of the config for the bare model"
        )
    if type(config) not in transformers.AutoModel._model_mapping:
        raise UsageError(f"{path}: AutoModel has no class for {raw['model_type']!r}: name one in architectures")
    return transformers.AutoModel.from_config  # type: ignore[no-any-return]


# --- inputs -----------------------------------------------------------------------------------------------------


def inputs_for(model: nn.Module, shapes: Shapes) -> tuple[tuple[object, ...], dict[str, object]]:
    """Inputs for a model that says what its main input is. Raises UsageError that names the missing argument."""
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    parameters = inspect.signature(model.forward).parameters
    if config is None or main is None or main not in parameters:
        needed = _needed(model.forward)
        if not needed:
            return (), {}
        raise UsageError(
            f"the argument {needed[0]!r} of {type(model).__name__}.forward is missing: pass args or kwargs"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    kwargs: dict[str, object] = {}
    for name in _wanted(config, main, parameters, shapes.batch):
        maker = _MAKERS.get(name)
        if maker is None:
            raise UsageError(f"no way is known to build {name!r} of {type(model).__name__}: pass args or kwargs")
        kwargs[name] = maker(config, shapes, device, dtype)
    if "use_cache" in parameters or hasattr(config, "use_cache"):
        kwargs["use_cache"] = False
    return (), kwargs


def _wanted(config: Config, main: str, parameters: Mapping[str, inspect.Parameter], batch: int) -> list[str]:
    """The main input, and what goes with it: the decoder's ids, the other tower of a dual encoder, a padding mask.

    One sequence alone needs no padding, so it has no mask.
    """
    names = [main]
    if main == "input_ids" and "attention_mask" in parameters and batch > 1:
        names.append("attention_mask")
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        names.append("decoder_input_ids")
    dual = hasattr(config, "vision_config") and hasattr(config, "text_config") and not _image_token(config)
    for other in ("input_ids", "pixel_values"):
        if dual and other in parameters and other not in names:
            names.append(other)
    return names


def _image_token(config: Config) -> bool:
    return any(getattr(config, n, None) is not None for n in ("image_token_id", "image_token_index"))


def _text(config: Config) -> Config:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def tokens(config: Config, shapes: Shapes) -> int:
    if shapes.seq is not None:
        return shapes.seq
    limit = getattr(_text(config), "max_position_embeddings", None) or getattr(_text(config), "n_positions", None)
    return min(_DEFAULT_SEQ, limit) if isinstance(limit, int) and limit > 0 else _DEFAULT_SEQ


def _ids(config: Config, shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shapes.batch, tokens(config, shapes), dtype=torch.long, device=device)


def _mask(config: Config, shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.ones(shapes.batch, tokens(config, shapes), dtype=torch.long, device=device)


def _pixels(config: Config, shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Tensor:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    channels = getattr(vision, "num_channels", 3)
    frames = getattr(vision, "num_frames", None)
    shape = (channels, height, width) if frames is None else (frames, channels, height, width)
    return torch.zeros(shapes.batch, *shape, dtype=dtype, device=device)


def _features(config: Config, shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Mel frames: bins × frames where the model fixes the number of frames, else frames × bins."""
    bins: Any = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", 80)
    source: int | None = getattr(config, "max_source_positions", None)
    if hasattr(config, "num_mel_bins") and source is not None:
        return torch.zeros(shapes.batch, bins, 2 * source, dtype=dtype, device=device)
    return torch.zeros(shapes.batch, tokens(config, shapes), bins, dtype=dtype, device=device)


def _samples(config: Config, shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Tensor:
    """One second of sound at 16 kHz, or `seq` samples."""
    return torch.zeros(shapes.batch, shapes.seq or 16000, dtype=dtype, device=device)


_MAKERS: Mapping[str, Callable[[Config, Shapes, torch.device, torch.dtype], Tensor]] = {
    "input_ids": _ids, "decoder_input_ids": _ids, "attention_mask": _mask, "pixel_values": _pixels,
    "pixel_values_videos": _pixels, "input_features": _features, "input_values": _samples,
}


# --- one decoding step ------------------------------------------------------------------------------------------


# What a model calls its cache of keys and values: transformers from 5.24 on, and before.
_CACHES = ("cache", "past_key_values")


def cache_name(model: nn.Module) -> str | None:
    """The argument, and the field of a result, that holds a decoder's keys and values; None where there is none."""
    taken = inspect.signature(model.forward).parameters
    return next((n for n in _CACHES if n in taken), None)


def decode_inputs(model: nn.Module, shapes: Shapes) -> tuple[tuple[object, ...], dict[str, object]]:
    """Inputs of a step of `seq` tokens (one where unset) after `past` tokens (the model's default length where 0)."""
    config = getattr(model, "config", None)
    name = cache_name(model)
    if config is None or getattr(config, "is_encoder_decoder", False) or name is None:
        raise UsageError("--phase decode needs a decoder-only model: this one has no cache to decode from")
    past = shapes.past or tokens(config, Shapes(shapes.batch))
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            filled = model(input_ids=torch.zeros(shapes.batch, past, dtype=torch.long, device=device), use_cache=True)
    except RuntimeError as error:
        raise UsageError(
            f"--phase decode: the model cannot fill its cache ({error}); another --dtype may do"
        ) from error
    cache = getattr(filled, name, None)
    if cache is None:
        raise UsageError(f"--phase decode: {type(model).__name__} returns no cache of keys and values")
    ids = torch.zeros(shapes.batch, shapes.seq or 1, dtype=torch.long, device=device)
    return (), {"input_ids": ids, name: cache, "use_cache": True}
