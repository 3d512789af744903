"""Path I: a model that is built already gives its experts to sluice, and gets them back exactly.

`backing="ram"`: the parameters' own storage becomes the store's memory, nothing is copied.
`backing="disk"`: the experts are written to a pack that only this session can see (unlinked while
open) and their storage is released. Either way the original modules wait in the attachment.
"""

from __future__ import annotations

import logging
import os
import secrets
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sluice import _core
from sluice.errors import ConfigError, UnsupportedModelError
from sluice.folders import PACK_SUFFIX, cache_folder
from sluice.hf import describe, devices, layout
from sluice.hf.attachment import Attachment, attachment_of
from sluice.hf.binding import open_session
from sluice.hf.checkpoint.open import open_pack
from sluice.hf.detect import Survey, survey_experts
from sluice.hf.restore import move_parameters, restore_model
from sluice.hf.site import ExpertSite, dtype_name
from sluice.progress import Progress
from sluice.text import format_bytes

_log = logging.getLogger("sluice")


def survey_model(model: nn.Module, exclude: Sequence[str] = (), strict: bool = True) -> Survey:
    """The sites of a built model, with everything refused that path I cannot take.

    Raises:
        ConfigError: It is offloaded already.
        UnsupportedModelError: No sites, hooks on one, or experts on a device of no use.
    """
    if attachment_of(model) is not None:
        raise ConfigError(
            f"{type(model).__name__}: got a model that sluice offloads already, expected a stock "
            "one; sluice.restore(model) first"
        )
    describe.refuse_quantised(getattr(model, "config", None), type(model).__name__)
    survey = survey_experts(model, exclude=exclude, strict=strict)
    for site in survey.sites:
        _refuse_odd_storage(site)
    return survey


def offload_model(model: nn.Module, survey: Survey, options: Any) -> Any:
    """Offloads a built model; the session, which the model also carries as `model.sluice`.

    Raises:
        ConfigError: `pack=` names a file.
        CapacityError: The budget is below one slot per size class.
        IoError: No space to spill. After any error the model is as it was.
    """
    if options.pack not in ("auto", "none"):
        raise ConfigError(
            f"pack: got {options.pack!r}, expected 'auto' for a model that is built: its own "
            "weights count; name packs in OffloadConfig"
        )
    sites, in_ram = survey.sites, options.backing == "ram"
    device = devices.device_of(model)
    attachment = Attachment(model, survey, home=device)
    move_parameters(sites, "cpu")
    try:
        store = _memory_store(sites, options) if in_ram else _spill(sites, options)
        session = open_session(store, options, sites, device)
    except BaseException:
        move_parameters(sites, device)
        raise
    try:
        attachment.swap_in(model)
        attachment.bind(model, session, holding="ram" if in_ram else "disk")
    except BaseException:
        attachment.swap_out(model)
        session.close()
        move_parameters(sites, device)
        raise
    if not in_ram:
        for site in sites:
            for name in site.parameters.values():
                parameter = getattr(site.module, name)
                parameter.data = torch.empty(0, dtype=parameter.dtype)
    session.add_close_hook(_restorer(model, attachment))
    _log.info(
        "%s: %d layers, %s, budget %d bytes",
        type(model).__name__,
        len(sites),
        store.description,
        session.budget_bytes,
    )
    return session


def _restorer(model: nn.Module, attachment: Attachment) -> Any:
    """Gives a model that is still offloaded its experts back: what ends a `with` block."""
    reference = weakref.ref(model)

    def hook() -> None:
        held = reference()
        if held is not None and attachment_of(held) is attachment:
            restore_model(held)

    return hook


def _refuse_odd_storage(site: ExpertSite) -> None:
    if "_hf_hook" in vars(site.module) or "forward" in vars(site.module):
        raise UnsupportedModelError(
            f"{site.label}: got a hook of accelerate on the experts, expected a plain module; load "
            "the model without offloading it to 'cpu' or 'disk'"
        )
    for name in site.parameters.values():
        parameter = getattr(site.module, name)
        dtype_name(parameter.dtype)
        devices.check_device(str(parameter.device), f"{site.label}.{name}")
        if not parameter.is_contiguous():
            raise UnsupportedModelError(
                f"{site.label}: got {name} with strides {parameter.stride()}, expected contiguous "
                f"experts; set {name}.data = {name}.data.contiguous() first"
            )


def _tensors(site: ExpertSite) -> dict[str, torch.Tensor]:
    return {s: getattr(site.module, name).detach() for s, name in site.parameters.items()}


def _memory_store(sites: Sequence[ExpertSite], options: Any) -> Any:
    """A store over the parameters where they lie; the sites' modules keep them alive."""
    builder = layout.empty_builder(options)
    for site in sites:
        layer = layout.add_layer(builder, site, dtype_name(site.dtype))
        layout.add_tensors(builder, layer, site, _tensors(site))
    store = builder.build("adopted memory")
    store.adopted = [tensor for site in sites for tensor in _tensors(site).values()]
    return store


def _spill(sites: Sequence[ExpertSite], options: Any) -> Any:
    """The experts in a pack that lives as long as the store has it open."""
    folder = cache_folder(options.offload_dir)
    folder.mkdir(parents=True, exist_ok=True)
    # The random part: containers that share a folder may share process ids.
    path = folder / f"spill-{os.getpid()}-{secrets.token_hex(8)}{PACK_SUFFIX}"
    total = sum(site.weight_bytes for site in sites)
    _log.info("spilling %s of experts to %s", format_bytes(total), path)
    memory = _memory_store(sites, options)
    geometry = [layout.layer_geometry(site, dtype_name(site.dtype)) for site in sites]
    try:
        writer = _core.PackWriter(str(path), geometry, fresh=True)
        try:
            with Progress("spilling experts", unit="experts") as bar:
                done = 0
                for layer, site in enumerate(sites):
                    for expert in range(site.num_experts):
                        writer.append_from(memory, layer, expert)
                        done += 1
                        bar(done, writer.num_experts)
            writer.finish()
        finally:
            writer.close()
        return open_pack(str(path), options)[0]
    finally:
        for leftover in (path, *(f"{path}.{end}" for end in ("partial", "journal", "journal.new"))):
            if os.path.exists(leftover):
                os.unlink(leftover)
