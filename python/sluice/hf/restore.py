"""The way back: original modules, their bytes, config fields and methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sluice.errors import CapacityError, ConfigError
from sluice.hf import layout
from sluice.hf.attachment import Attachment, attachment_of
from sluice.hf.site import ExpertSite
from sluice.memory import available_bytes
from sluice.progress import Progress
from sluice.text import format_bytes


def restore_model(model: nn.Module) -> None:
    """Undoes an offload. Adopted experts never left; others are read back, bit-equal.

    Raises:
        ConfigError: The model is not offloaded.
        CapacityError: RAM does not suffice for all experts; the model stays offloaded.
    """
    attachment = attachment_of(model)
    if attachment is None:
        raise ConfigError(
            f"{type(model).__name__}: got a model that sluice does not offload, expected one from "
            "sluice.offload or OffloadConfig"
        )
    if attachment.holding != "ram":
        _fill(attachment)
    attachment.swap_out(model)
    attachment.session.close()
    move_parameters(attachment.sites, attachment.home)


def move_parameters(sites: Sequence[ExpertSite], device: str) -> None:
    """Puts the experts of the original modules on a device, layer by layer."""
    for site in sites:
        for name in site.parameters.values():
            held: Any = getattr(site.module, name)
            if held.device.type != "meta" and str(held.device) != device:
                held.data = held.data.to(device)


def _fill(attachment: Attachment) -> None:
    """Gives every parameter of the original modules its storage again; all or none."""
    store = attachment.session.store
    kinds = [site.dtype for site in attachment.sites]
    needed = sum(
        site.num_parameters * kind.itemsize
        for site, kind in zip(attachment.sites, kinds, strict=True)
    )
    available = available_bytes()
    if needed > available:
        raise CapacityError(
            f"restore: got {format_bytes(available)} of free RAM, expected {format_bytes(needed)} "
            "for all experts; free some, or go on offloaded"
        )
    read: list[dict[str, torch.Tensor]] = []
    with Progress("restoring experts", unit="layers") as bar:
        for layer, (site, kind) in enumerate(zip(attachment.sites, kinds, strict=True)):
            read.append(layout.read_tensors(store, layer, site, kind))
            bar(layer + 1, len(kinds))
    for site, tensors in zip(attachment.sites, read, strict=True):
        for section, name in site.parameters.items():
            _give(site.module, name, tensors[section])


def _give(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Same Parameter object where it can be; a meta parameter needs a new one."""
    held: Any = getattr(module, name)
    if held.device.type == "meta":
        setattr(module, name, nn.Parameter(tensor, requires_grad=held.requires_grad))
    else:
        held.data = tensor
