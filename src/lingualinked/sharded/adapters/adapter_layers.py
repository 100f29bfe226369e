"""The adapter layers that peft puts around modules of a sharded model, in this process: what they hold, and what is active.

Stages compute with layers like them. Knows peft's layers for LoRA; neither files nor workers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lingualinked.errors import ArgumentError, UnsupportedOperationError
from lingualinked.model.adapters.adapter_data import AdaptedModule, Adapter, AdapterUse
from lingualinked.quantities import count_text

_BASE = "base_layer"
_KINDS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_OF_ROWS = "_adapter_names_pre_forward_hook"  # by which peft tells its layers the adapters of rows
_NONE = "__base__"
_DISABLED = AdapterUse((), is_disabled=True)
_numbers = itertools.count(1)


class AdapterLayers:
    """The adapter layers of one model, by the paths of the modules that they wrap."""

    def __init__(self) -> None:
        self.layers: dict[str, Any] = {}
        self.num_changes = 0  # of the modules, not of what they hold
        self._watched: dict[str, _Watched] = {}
        self._activation: list[Any] | None = None  # of all layers, when `_active` was read
        self._active: AdapterUse | None = None
        self._known: dict[str, tuple[tuple[Any, ...], Adapter]] = {}  # what each adapter held last, by name

    def replace(self, path: str, held: nn.Module, new: nn.Module) -> bool:
        """Register that an adapter layer wraps a module, or no longer does; return False if this is something else.

        Raises UnsupportedOperationError for wrappers that stages can't have.
        """
        if held is self.layers.get(path) and new is getattr(held, _BASE, None):
            del self.layers[path]
            self._watched.pop(path, None)
        elif type(new).__module__.startswith("peft.") and any(held is each for each in new.children()):
            _check_kind(path, new)
            self.layers[path] = new
        else:
            return False
        self.num_changes += 1
        return True

    def read_adapters(self) -> dict[str, Adapter]:
        """Return what all adapters hold now, by name; one that has not changed is the same object as before."""
        if not self._has_changed():
            return {name: adapter for name, (_, adapter) in self._known.items()}
        self._watched = {path: _Watched(path, layer) for path, layer in self.layers.items()}
        self._activation = None
        held: dict[str, list[_Content]] = {}
        for watched in self._watched.values():
            for content in watched.contents:
                held.setdefault(content.module_of, []).append(content)
        known = self._known
        self._known = {}
        for name, contents in held.items():
            state = tuple(content.state for content in contents)
            if name in known and known[name][0] == state:
                self._known[name] = known[name]
            else:
                modules = tuple(content.module for content in contents)
                self._known[name] = state, Adapter(name, next(_numbers), modules)
        return {name: adapter for name, (_, adapter) in self._known.items()}

    def tensors_of(self, name: str) -> dict[str, tuple[Tensor, ...]]:
        """Return an adapter's tensors as `read_adapters` found them, by the path of their module."""
        return {
            path: content.tensors
            for path, watched in self._watched.items()
            for content in watched.contents
            if content.module_of == name
        }

    def read_use(self, asked: Sequence[str] | None, num_rows: int, skipped: tuple[str, ...] = ()) -> AdapterUse | None:
        """Return which adapters are active now; `asked` are those of the rows, if the call names them.

        `skipped` are the beginnings of paths that are not in the model at the moment, where nothing is switched.
        """
        rows = self._rows_of_peft() if asked is None else asked
        state = [skipped, *(watched.activation for watched in self._watched.values())]
        if state != self._activation:
            self._active = self._read_active(
                {path: watched for path, watched in self._watched.items() if not path.startswith(skipped)}
            )
            self._activation = [skipped, *(watched.activation for watched in self._watched.values())]
        if rows is not None:
            return AdapterUse((), _check_rows(rows, num_rows, self._watched), self._active == _DISABLED)
        return self._active

    def _read_active(self, present: dict[str, _Watched]) -> AdapterUse | None:
        """Return which adapters are active in some layers; raise UnsupportedOperationError if layers differ in it."""
        if not any(watched.names for watched in present.values()):
            return None
        is_disabled = next(iter(present.values())).layer.disable_adapters
        if is_disabled:
            self._unmerge()
        names: tuple[str, ...] = ()
        for watched in present.values():
            if watched.effective and len(watched.active) > len(names):
                names = watched.active
        for path, watched in present.items():
            layer = watched.layer
            expected = tuple(name for name in names if name in watched.names)
            if layer.disable_adapters is not is_disabled or watched.effective != expected:
                raise UnsupportedOperationError(
                    f"{path} of a sharded model has other active adapters than other layers: set_adapter of the whole model"
                )
            if layer.training and any(isinstance(each, nn.Dropout) for each in layer.lora_dropout.values()):
                raise UnsupportedOperationError(
                    f"dropout in the adapters of {path}: a sharded model does not train, call eval()"
                )
            if not vars(layer).get("cast_input_dtype_enabled", True):
                raise UnsupportedOperationError(f"{path} of a sharded model without casts of its input: stages cast it")
        return _DISABLED if is_disabled else AdapterUse(names)

    def _unmerge(self) -> None:
        """Take merged adapters out of the weights, as peft's layers do in a forward pass while they are disabled."""
        for watched in self._watched.values():
            if watched.layer.merged:
                watched.layer.unmerge()

    def check_hooks(self) -> None:
        """Refuse hooks on the parts of adapter layers, and other forwards of them, which no stage would call."""
        for path, watched in self._watched.items():
            if "forward" in vars(watched.layer):
                raise UnsupportedOperationError(
                    f"another forward of the adapter layer {path} would not be called: replace that of {path}.{_BASE}"
                )
            if any(watched.hooks):
                raise UnsupportedOperationError(
                    f"a hook of a part of the adapter layer {path} would not be called: hook {path} itself, or {path}.{_BASE}"
                )

    def _has_changed(self) -> bool:
        if len(self._watched) != len(self.layers):
            return True
        return any(
            each.layer is not self.layers.get(path) or each.has_changed() for path, each in self._watched.items()
        )

    def _rows_of_peft(self) -> Sequence[str] | None:
        for layer in self.layers.values():
            for hook in vars(layer)["_forward_pre_hooks"].values():
                if is_of_peft(hook):
                    return list(hook.keywords["adapter_names"])
        return None


class _Parameter(nn.Parameter):
    """A tensor of an adapter that counts changes through ``data`` too."""

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]


class _Content:
    """What one layer has of one adapter."""

    def __init__(self, path: str, layer: Any, name: str) -> None:
        self.module_of = name
        self.modules: list[tuple[Any, str, nn.Module]] = []  # registry, name and what is there
        self.places: list[tuple[Any, str, Tensor, int, int]] = []  # registry, key, tensor, version and memory
        names = []
        for kind in _KINDS:
            registry = getattr(layer, kind)
            if name not in registry:
                continue
            held = registry[name]
            owners = [("", registry, name)] if isinstance(held, Tensor) else []
            if not owners:
                self.modules.append((registry._modules, name, held))  # noqa: SLF001 - a lookup without a search
                owners = [(f".{each}", held, each) for each, _ in held.named_parameters()]
            for suffix, owner, key in owners:
                registered = owner._parameters  # noqa: SLF001 - a lookup without a search
                tensor = registered[key]
                if tensor.is_inference():
                    raise UnsupportedOperationError(
                        f"{kind} at {path} was made in torch.inference_mode(), which counts no changes: load adapters outside of it"
                    )
                if type(tensor) is nn.Parameter:
                    tensor.__class__ = _Parameter
                names.append(f"{kind}.{name}{suffix}")
                self.places.append((registered, key, tensor, tensor._version, tensor.data_ptr()))  # noqa: SLF001
        self.tensors = tuple(tensor.detach() for _, _, tensor, _, _ in self.places)
        self.module = AdaptedModule(
            path=path,
            rank=layer.r[name],
            scaling=float(layer.scaling[name]),
            use_dora=name in layer.lora_variant,
            has_bias=layer.lora_bias.get(name, False),
            tensors=tuple(names),
        )
        self.state = self.module, tuple((id(tensor), *rest) for _, _, tensor, *rest in self.places)


class _Watched:
    """One adapter layer as it was when it was last read."""

    def __init__(self, path: str, layer: Any) -> None:
        _check_kind(path, layer)
        self.layer = layer
        self.names = frozenset([*layer.lora_A, *layer.lora_embedding_A])
        self.contents = [_Content(path, layer, name) for name in sorted(self.names)]
        self._scaling = dict(layer.scaling)
        base = set(map(id, layer.base_layer.modules()))
        own = [vars(each) for each in layer.modules() if each is not layer and id(each) not in base]
        self.hooks = [state[name] for state in own for name in ("_forward_pre_hooks", "_forward_hooks")]

    @property
    def active(self) -> tuple[str, ...]:
        return tuple(self.layer.active_adapters)

    @property
    def effective(self) -> tuple[str, ...]:
        """Those of the active adapters that the layer has; none while some are merged into its weight."""
        return () if self.layer.merged_adapters else tuple(name for name in self.active if name in self.names)

    @property
    def activation(self) -> tuple[Any, ...]:
        """What decides which adapters are active."""
        state = vars(self.layer)
        active, merged = state["_active_adapter"], state["merged_adapters"]
        casts = state.get("cast_input_dtype_enabled")
        return (
            active if isinstance(active, str) else [*active],
            [*merged],
            state["_disable_adapters"],
            state["training"],
            casts,
        )

    def has_changed(self) -> bool:
        if vars(self.layer)["scaling"] != self._scaling:  # which has an item for each adapter
            return True
        for content in self.contents:
            for registry, name, module in content.modules:
                if registry.get(name) is not module:
                    return True
            for registry, key, tensor, version, memory in content.places:
                if registry.get(key) is not tensor or tensor._version != version or tensor.data_ptr() != memory:  # noqa: SLF001
                    return True
        return False


def _check_kind(path: str, layer: Any) -> None:
    """Raise UnsupportedOperationError for a wrapper that stages can't have."""
    from peft.tuners.lora import layer as lora, variants

    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if vars(type(layer)).get("real_class", type(layer)) not in (lora.Linear, lora.Embedding):
        raise UnsupportedOperationError(
            f"{path} of a sharded model can't be wrapped by {kind}: adapters are LoRA (with rsLoRA and DoRA) of linear layers and "
            "embeddings, without modules_to_save, trainable tokens and target_parameters"
        )
    known = (variants.DoraLinearVariant, variants.DoraEmbeddingVariant)
    others = [type(each).__name__ for each in layer.lora_variant.values() if type(each) not in known]
    if others:
        raise UnsupportedOperationError(
            f"{others[0]} at {path} of a sharded model: of LoRA's variants, only DoRA is supported"
        )


def is_of_peft(hook: Any) -> bool:
    """Return whether a hook is the one by which peft tells its layers the adapters of rows."""
    return isinstance(hook, functools.partial) and getattr(hook.func, "__name__", "") == _OF_ROWS


def _check_rows(rows: Sequence[str], num_rows: int, watched: dict[str, _Watched]) -> tuple[str, ...]:
    """Check the adapters that a call names for its rows, as peft does."""
    known = {name for each in watched.values() for name in each.names}
    if isinstance(rows, str) or not all(isinstance(name, str) for name in rows):
        raise ArgumentError(f"adapter_names={rows!r} must be a list of names, one for each row")
    if len(rows) != num_rows:
        raise ArgumentError(
            f"adapter_names has {count_text(len(rows), 'name')} for {count_text(num_rows, 'row')}: give one for each row"
        )
    unknown = sorted(set(rows) - known - {_NONE})
    if unknown:
        raise ArgumentError(
            f"adapter_names has {unknown[0]!r}, which is not loaded: there are {sorted(known)}; call load_adapter first"
        )
    for path, layer in watched.items():
        if layer.layer.merged_adapters:
            raise ArgumentError(f"adapter_names while adapters are merged into {path}: call unmerge_adapter first")
        for name in set(rows) & layer.names:
            if layer.layer.use_dora.get(name, False):
                raise ArgumentError(
                    f"adapter_names with {name!r}, which is DoRA at {path}: peft has no DoRA by rows; use set_adapter"
                )
    return tuple(rows)
