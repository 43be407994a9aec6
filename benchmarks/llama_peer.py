"""llama.cpp as a peer: a process that times it on request, and the client that starts it and asks.

Does: time decode and prefill calls of llama-cpp-python at the lowest level, each with the fetch of its logits, and
requantise a GGUF file. Does not: import anything of `mar`, or torch: it runs in an environment of its own, made by

    python -m venv PEER
    CMAKE_ARGS=-DGGML_NATIVE=ON PEER/bin/pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36
    PEER/bin/python benchmarks/llama_peer.py quantize SOURCE.gguf Q8_0 TARGET.gguf
    PEER/bin/python benchmarks/llama_peer.py serve FILE.gguf

Native code of llama.cpp crashes on some CPUs with AMX; name the instruction sets instead (-DGGML_NATIVE=OFF
-DGGML_AVX512=ON ...). The server reads one JSON request a line, such as {"do": "decode", ...}, and answers each in one.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 2048
"""Tokens handed to llama.cpp in one call at most; its own `ubatch` says how many it computes at once."""

BLOCK = 1024
"""Tokens really read by `fill`."""


GGML_LOG_LEVEL_ERROR = 4


class LlamaPeer:
    """The client's end. `info` says what the server runs; use as a context manager, or the process stays."""

    def __init__(self, python: str | Path, file: Path):
        command = [str(python), __file__, "serve", str(file)]
        self.file = file
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.info = self._answer()

    def __enter__(self) -> LlamaPeer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, do: str, **request: Any) -> Any:
        """Call the method of `_Server` that has this name; raises OSError if the process has died."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise OSError(
                f"llama.cpp ended with code {self._process.wait()} on {self.file.name}; see what it printed above, "
                "and rebuild it for fewer instruction sets if it crashed."
            )
        return json.loads(line)


class _Server:
    """One model and a llama.cpp context, with a cache of its own, for each name that `open` was called with."""

    def __init__(self, file: str):
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self.api = llama_cpp
        self.contexts: dict[str, Any] = {}
        self._log = llama_cpp.llama_log_callback(_print_errors)  # llama.cpp keeps no reference to it
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {file}.")
        self.words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def describe(self) -> dict[str, Any]:
        """Versions, what the file holds, and which instructions llama.cpp uses."""
        text = ctypes.create_string_buffer(256)
        self.api.llama_model_desc(self.model, text, len(text))
        return {
            "version": self.api.__version__,
            "quantisation": text.value.decode().split(" ", 2)[2].split(" - ")[0],
            "megabytes": self.api.llama_model_size(self.model) / 1e6,
            "trained_context": self.api.llama_model_n_ctx_train(self.model),
            "system": self.api.llama_print_system_info().decode().strip(),
        }

    def open(self, name: str, length: int, ubatch: int = 512, flash: bool | None = None) -> None:
        """Make a context for `length` tokens, in place of an older one of this name. flash None: llama.cpp decides."""
        self.close(name)
        settings = self.api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = length, BATCH, ubatch
        settings.n_seq_max, settings.kv_unified = 2, True  # a second sequence for `fill`
        settings.flash_attn_type = -1 if flash is None else int(flash)
        self.contexts[name] = self.api.llama_init_from_model(self.model, settings)
        if not self.contexts[name]:
            raise SystemExit(f"llama.cpp cannot make a context of {length} tokens.")

    def close(self, name: str) -> None:
        """Give the memory of a context back, if there is one of this name."""
        if context := self.contexts.pop(name, None):
            self.api.llama_free(context)

    def prefill(self, name: str, tokens: list[int], threads: int) -> float:
        """Seconds to read tokens into an emptied cache, up to the logits of the last."""
        context = self._rewind(name, 0, threads)
        started = time.perf_counter()
        for first in range(0, len(tokens), BATCH):
            self._read(context, tokens[first : first + BATCH])
        return time.perf_counter() - started

    def fill(self, name: str, tokens: list[int], threads: int) -> None:
        """Fill the cache to this many tokens in little time: keys and values of the first BLOCK, over and over.

        Where decoding is only timed, a cache of the right length will do, and a long text takes llama.cpp very long.
        """
        self.prefill(name, tokens[:BLOCK], threads)
        context, api = self.contexts[name], self.api
        memory = api.llama_get_memory(context)
        size = api.llama_state_seq_get_size(context, 0)
        block = (ctypes.c_uint8 * size)()
        api.llama_state_seq_get_data(context, block, size, 0)
        for start in range(BLOCK, len(tokens), BLOCK):
            if not api.llama_state_seq_set_data(context, block, size, 1):
                raise SystemExit(f"llama.cpp cannot fill its cache to {len(tokens)} tokens.")
            api.llama_memory_seq_add(memory, 1, 0, -1, start)
            api.llama_memory_seq_cp(memory, 1, 0, -1, -1)
            api.llama_memory_seq_rm(memory, 1, -1, -1)
        # the positions of the copies are worked into their keys by the next call
        self.decode(name, len(tokens), tokens[-1:], threads)

    def decode(self, name: str, start: int, tokens: list[int], threads: int) -> list[float]:
        """Seconds of each single-token call after the first `start` tokens of the cache."""
        context = self._rewind(name, start, threads)
        seconds = []
        for token in tokens:
            started = time.perf_counter()
            self._read(context, [token])
            seconds.append(time.perf_counter() - started)
        return seconds

    def resident_megabytes(self) -> float:
        """Resident memory of this process."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1000

    def _rewind(self, name: str, length: int, threads: int) -> Any:
        context = self.contexts[name]
        self.api.llama_memory_seq_rm(self.api.llama_get_memory(context), 0, length, -1)
        self.api.llama_set_n_threads(context, threads, threads)
        return context

    def _read(self, context: Any, tokens: list[int]) -> Any:
        array = (self.api.llama_token * len(tokens))(*tokens)
        if code := self.api.llama_decode(context, self.api.llama_batch_get_one(array, len(tokens))):
            raise SystemExit(f"llama_decode returned {code}.")
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(context, -1), (self.words,))


def _print_errors(level: int, text: bytes, _: Any) -> None:
    if level == GGML_LOG_LEVEL_ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


def serve(file: str) -> None:
    """Answer requests from stdin until it closes."""
    server = _Server(file)
    print(json.dumps(server.describe()), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(server, request.pop("do"))(**request)), flush=True)


def quantize(source: str, kind: str, target: str) -> None:
    """Requantise a GGUF file as llama.cpp does by default; kind is the name of its file type, such as Q8_0."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.allow_requantize = True
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), settings):
        raise SystemExit(f"llama.cpp cannot requantise {source}.")


if __name__ == "__main__":
    {"serve": serve, "quantize": quantize}[sys.argv[1]](*sys.argv[2:])
