"""linear_head: the Head of an output module, whatever a library has wrapped around it."""

from __future__ import annotations

from typing import Any

import torch

from rollfuse.kernels.head import Head, Lora


def linear_head(module: torch.nn.Module, **options: Any) -> Head:
    """The Head of a torch.nn.Linear, or of one that PEFT has wrapped (LoRA, modules_to_save).

    An active LoRA adapter becomes `Head.lora`, with the module's own parameters, unmerged.

    Args:
        module: the LM head, such as `model.lm_head` or `model.get_output_embeddings()`.
        options: the other arguments of Head (scale, softcap, vocab, ...).

    Raises:
        TypeError: it is no linear module.
        ValueError: the adapter is not a plain one: several are active, DoRA, a bias, or dropout
            in training, which act on something else than the hidden states.
    """
    module = _saved_by_peft(module)
    if not hasattr(module, "base_layer"):
        return Head(*_linear(module), **options)
    weight, bias = _linear(module.base_layer)
    return Head(weight, bias, lora=_active_lora(module), **options)


def is_linear_head(module: torch.nn.Module) -> bool:
    """Whether a torch.nn.Linear is what `module` is, or is wrapped around."""
    module = _saved_by_peft(module)
    return isinstance(getattr(module, "base_layer", module), torch.nn.Linear)


def described(module: torch.nn.Module) -> str:
    """What `module` is, for a message that refuses it."""
    name = type(module).__name__
    if not hasattr(module, "token_adapter"):
        return name
    return (
        f"{name}, where PEFT trains the rows of some tokens (trainable_token_indices); make a Head "
        "of its `weight`, which puts them in place anew, before every pass"
    )


def _saved_by_peft(module: torch.nn.Module) -> torch.nn.Module:
    """What a ModulesToSaveWrapper calls in its forward."""
    saved: Any = getattr(module, "modules_to_save", None)
    if saved is None:
        return module
    wrapper: Any = module
    active = list(wrapper.active_adapters)
    if wrapper.disable_adapters or not active or active[0] not in saved:
        original: torch.nn.Module = wrapper.original_module
        return original
    chosen: torch.nn.Module = saved[active[0]]
    return chosen


def _linear(module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not isinstance(module, torch.nn.Linear):
        raise TypeError(
            f"module: need a torch.nn.Linear, or PEFT's wrapper around one, got {described(module)}"
        )
    own_forward = "forward" in vars(module) or type(module).forward is not torch.nn.Linear.forward
    hooked = bool(module._forward_hooks or module._forward_pre_hooks)
    if own_forward or hooked:
        got = "one with a forward of its own" if own_forward else "one with forward hooks"
        raise TypeError(
            f"module: need a torch.nn.Linear that does nothing else, got {got}; pass "
            "Head(module.weight, module.bias) if that is all there is to it"
        )
    return module.weight, module.bias


def _active_lora(module: Any) -> Lora | None:
    """The adapter the wrapper's forward would add; None if it is merged or switched off."""
    if not hasattr(module, "lora_A"):
        raise ValueError(f"module: need LoRA, of PEFT's adapters, got {type(module).__name__}")
    if module.merged and module.disable_adapters:
        raise ValueError("module: need an adapter unmerged before it is disabled, got a merged one")
    if module.merged or module.disable_adapters:
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if not names:
        return None
    if len(names) > 1:
        raise ValueError(f"module: need one active adapter, got {', '.join(names)}")
    (name,) = names
    a, b, dropout = (getattr(module, part)[name] for part in ("lora_A", "lora_B", "lora_dropout"))
    for is_bad, what in (
        (name in getattr(module, "lora_variant", {}), "a variant of it (such as DoRA)"),
        (getattr(module, "use_dora", {}).get(name, False), "DoRA"),
        (b.bias is not None, "a bias in lora_B"),
        (dropout.training and getattr(dropout, "p", 0.0) > 0, "dropout before lora_A"),
    ):
        if is_bad:
            raise ValueError(f"module: need a plain LoRA adapter, got {what} in {name!r}")
    return Lora(a.weight, b.weight, float(module.scaling[name]))
