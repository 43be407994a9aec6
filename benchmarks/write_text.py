"""Tokens per second at which a teacher writes its own training text, next to transformers' `generate` on the same work.

Does: let mar.generate.write_text and `generate` (bf16, temperature 1, one padded batch) write as many documents of the
same greatest length from mar.prompts, in turns; say where a step's time goes. Does not: judge the text.
Two rates: of tokens written, and of tokens of documents, which hold their prompts too (what a training run gets).

    python benchmarks/write_text.py [--json] [--teacher smollm2-135m] [--length 512] [--batch 64 128] [--no-plain]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mar.generate import prompt_ids, sample, stop_ids, write_text
from mar.kernels.paged import Pages, read_prompt
from mar.prompts import TRAIN_PROMPTS
from mar.teachers import Teacher, load_teacher
from timing import arguments, environment, finish, settings, show


def ours(teacher: Teacher, batch: int, length: int) -> list[Tensor]:
    """As many tokens as `batch` documents of full length hold."""
    return write_text(teacher.model, teacher.tokenizer, list(TRAIN_PROMPTS), batch * length, length, batch, seed=0)


@torch.inference_mode()
def plain(teacher: Teacher, batch: int, length: int) -> list[Tensor]:
    """`batch` documents, each up to its end of text, by transformers' own loop: padded on the left, DynamicCache."""
    rows = [prompt_ids(teacher.tokenizer, TRAIN_PROMPTS[number % len(TRAIN_PROMPTS)])[0] for number in range(batch)]
    widest = max(map(len, rows))
    padded = torch.stack([torch.cat([row.new_zeros(widest - len(row)), row]) for row in rows])
    mask = torch.stack([torch.arange(widest) >= widest - len(row) for row in rows]).long()
    torch.manual_seed(0)
    model: Any = teacher.model
    output = model.generate(
        padded, attention_mask=mask, max_length=length, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
    )
    ends = torch.tensor(sorted(stop_ids(teacher.model)))
    documents = []
    for row, prompt in zip(output, rows, strict=True):
        found = torch.isin(row[widest:], ends).nonzero()
        stop = int(found[0]) + 1 if len(found) else len(row) - widest
        documents.append(torch.cat([prompt, row[widest : widest + stop]]))
    return documents


def rates(teacher: Teacher, write: Callable[[Teacher, int, int], list[Tensor]], batch: int, length: int) -> dict:
    """Documents, tokens, seconds and tokens per second of one call, the reading of prompts included."""
    started, cpu = time.perf_counter(), time.process_time()
    documents = write(teacher, batch, length)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    prompts = [len(prompt_ids(teacher.tokenizer, prompt)[0]) for prompt in TRAIN_PROMPTS]
    tokens = sum(map(len, documents))
    written = tokens - sum(prompts[number % len(prompts)] for number in range(len(documents)))
    return {
        "documents": len(documents),
        "tokens": tokens,
        "written_tokens": written,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "tokens_per_second": tokens / seconds,
        "written_tokens_per_second": written / seconds,
    }


@torch.inference_mode()
def step_milliseconds(teacher: Teacher, batch: int, context: int, rounds: int = 5) -> dict[str, float]:
    """Least milliseconds of one step at a context: of the model, of its attention alone, and of sampling."""
    model = teacher.model
    pages = Pages(model, batch, context + rounds + 1)
    generator = torch.Generator().manual_seed(0)
    prompt = read_prompt(model, torch.full((context,), model.config.vocab_size // 2))
    for slot in range(batch):
        pages.admit(slot, prompt)
    attend, inside = pages.attend, [0.0]

    def timed(*given: Any) -> Tensor:
        started = time.perf_counter()
        output = attend(*given)
        inside[0] += time.perf_counter() - started
        return output

    pages.attend = timed  # type: ignore[method-assign]
    found = []
    for _ in range(rounds):
        inside[0] = 0.0
        started = time.perf_counter()
        logits = pages.step([0] * batch)
        middle = time.perf_counter()
        sample(logits, generator=generator)
        found.append({"model": middle - started, "attention": inside[0], "sampling": time.perf_counter() - middle})
    return {name: 1000 * min(part[name] for part in found) for name in found[0]}


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--teacher", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=512, help="most tokens a document")
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 128], help="documents written side by side")
    parser.add_argument("--no-plain", action="store_true", help="leave out transformers' generate")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    teacher = load_teacher(options.teacher, torch.bfloat16)
    peers = {"ours": ours} if options.no_plain else {"ours": ours, "plain": plain}
    figures: dict[str, Any] = {"environment": environment(), "settings": settings(options), "batches": {}}
    for batch in options.batch:
        found: dict[str, Any] = {name: rates(teacher, write, batch, options.length) for name, write in peers.items()}
        columns = ["", *found["ours"]]
        rows = [[name, *figure.values()] for name, figure in found.items()]
        show(f"{batch} documents of up to {options.length} tokens side by side", columns, rows)
        parts = step_milliseconds(teacher, batch, options.length // 2)
        show(f"ours, milliseconds a step at context {options.length // 2}", list(parts), [list(parts.values())])
        figures["batches"][str(batch)] = {**found, "step_milliseconds": parts}
    finish(figures, options)


if __name__ == "__main__":
    main()
