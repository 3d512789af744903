"""An offloaded model and its process: Ctrl-C, a full disk, exit, fork."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from sluice import _core

from . import tiny


def in_a_process(code: str, folder: Path, timeout: float = 120) -> str:
    """Runs `code` with `model` loaded by path Q; what it printed."""
    before = f"""
        import os, signal, sys, threading, time, torch, sluice
        from transformers import AutoModelForCausalLM
        torch.set_num_threads(1)
        config = sluice.OffloadConfig(device_memory="5%")
        model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, quantization_config=config)
        ids = torch.tensor([[1, 5, 9, 77, 20]])
        run = lambda n=4: model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False,
            pad_token_id=0)
        """
    script = textwrap.dedent(before) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.emulated
def test_ctrl_c_ends_a_generation_and_the_session_goes_on(saved: Callable[..., Path]) -> None:
    out = in_a_process(
        """
        expected = run()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have ignored it
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        try:
            while True:
                run(64)
        except KeyboardInterrupt:
            print("interrupted")
        print(torch.equal(run(), expected))
        """,
        saved("mixtral"),
    )
    assert out.split() == ["interrupted", "True"]


def test_a_disk_that_fills_while_spilling_or_packing_loses_nothing(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = saved("mixtral")
    out = in_a_process(
        f"""
        import resource
        from pathlib import Path
        from sluice import pack
        folder, checkpoint = Path({str(tmp_path)!r}), {str(checkpoint)!r}
        # A write past the limit fails, as on a full disk.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        stock = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
        expected = stock(ids).logits
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        for fill in (
            lambda: sluice.offload(
                stock, device_memory="50%", backing="disk", offload_dir=folder),
            lambda: pack.make_pack(checkpoint, out=folder / "a.sluice.safetensors"),
        ):
            try:
                fill()
            except sluice.IoError as error:
                print(error.errno is not None, "write" in str(error))
        print(torch.equal(stock(ids).logits, expected))
        print([p.name for p in folder.iterdir() if p.name.endswith(".sluice.safetensors")])
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        with sluice.offload(stock, device_memory="50%", backing="disk", offload_dir=folder):
            print(torch.allclose(stock(ids).logits, expected, atol=1e-4))
        print(pack.make_pack(checkpoint, out=folder / "a.sluice.safetensors").exists())
        """,
        checkpoint,
    )
    assert out.splitlines() == ["True True", "True True", "True", "[]", "True", "True"]


def test_a_process_ends_with_a_session_open_and_reads_in_flight(
    saved: Callable[..., Path],
) -> None:
    out = in_a_process(
        """
        run()
        every = [(l, e, 1.0, float("inf")) for l in range(3) for e in range(8)]
        model.sluice.hint(every)
        print("leaving")
        """,
        saved("mixtral"),
        timeout=60,
    )
    assert out.split() == ["leaving"]


def test_a_process_ends_with_a_spilled_model_open(saved: Callable[..., Path]) -> None:
    out = in_a_process(
        f"""
        sluice.restore(model)
        built = AutoModelForCausalLM.from_pretrained({str(saved("mixtral"))!r})
        session = sluice.offload(built, device_memory="25%")
        print("leaving")
        """,
        saved("mixtral"),
        timeout=60,
    )
    assert out.split() == ["leaving"]


@pytest.mark.emulated
def test_a_forked_child_is_told_and_can_make_its_own(saved: Callable[..., Path]) -> None:
    out = in_a_process(
        f"""
        run()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                model(ids)
            except sluice.SluiceError as error:
                print("refused" if "process" in str(error) else error, flush=True)
            try:
                other = AutoModelForCausalLM.from_pretrained(
                    {str(saved("mixtral"))!r}, quantization_config=config)
            except sluice.DeviceError as error:
                print("spawn" if "by spawn" in str(error) else error, flush=True)
                os._exit(0)
            with torch.no_grad():
                other(ids)
            print("own", flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(status, torch.equal(run(), run()))
        """,
        saved("mixtral"),
    )
    # CUDA itself works in no child of a process that has used it.
    made = "spawn" if _core.has_slots_apart("cpu") else "own"
    assert out.split() == ["refused", made, "0", "True"]


def test_loading_never_holds_all_experts(tmp_path: Path) -> None:
    """Experts of 96 MiB at a budget of 6 MiB: anonymous memory grows by far less than them."""
    large = tiny.build(
        "mixtral", hidden_size=256, intermediate_size=1024, num_local_experts=32,
        num_hidden_layers=1,
    )  # fmt: skip
    folder = tmp_path / "large"
    large.save_pretrained(folder)
    total = sum(p.numel() * 4 for n, p in large.named_parameters() if ".experts." in n)
    assert total == 32 * 3 * 256 * 1024 * 4
    out = in_a_process(
        """
        def anonymous():
            text = open("/proc/self/status").read()
            return int(text.split("RssAnon:")[1].split()[0]) * 1024
        model.sluice.close()
        del model
        import gc; gc.collect()
        before = anonymous()
        seen = []
        stop = threading.Event()
        def watch():
            while not stop.is_set():
                seen.append(anonymous())
                time.sleep(0.002)
        thread = threading.Thread(target=watch); thread.start()
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        run()
        stop.set(); thread.join()
        print(max(seen) - before)
        """.replace("folder", repr(str(folder))),
        folder,
    )
    assert int(out) < total // 3
