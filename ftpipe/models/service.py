"""One forward pass serves many: losses of the trained tokens, embeddings, and generated answers.

The backbone runs over the row; the output head runs only at the positions that predict a trained token, a chunk of them at a time. So the logits of prompts,
200 kB a token for a vocabulary of 50,000, are never built.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftpipe.data.render import Rendered, Renderer
from ftpipe.errors import DataError, FtpipeError
from ftpipe.models.head import split
from ftpipe.models.lanes import Lanes, possible
from ftpipe.models.loading import DType, load_adapted, load_model, load_tokenizer
from ftpipe.stages.base import Environment

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ftpipe.decode.base import Decoder

CHUNK_FLOATS = 2**24
"""Most logits (float32) in memory at once: 64 MiB."""
BATCH_TOKENS = 16_384
"""Padded tokens of one batch on a GPU."""
log = logging.getLogger("ftpipe")


@dataclass(frozen=True)
class RowScore:
    """What a forward pass found out about one row.

    nll: sum over the trained tokens of -ln p(token | what precedes it), in nats; None if not asked for. trained_tokens: how many there were: tokens
    with `trained` set, except the very first token of a row, which nothing predicts, and those cut off by the length limit.
    tokens: tokens the model saw. embedding: (hidden,) float32, the mean of the last hidden states (after the final norm) over all tokens of the row,
    prompt and answer alike, not normalised; None if not asked for.
    """

    nll: float | None
    trained_tokens: int
    tokens: int
    embedding: np.ndarray | None = None

    @property
    def loss(self) -> float | None:
        """Mean loss of a trained token in nats; None without one."""
        return self.nll / self.trained_tokens if self.nll is not None and self.trained_tokens else None


@dataclass(frozen=True)
class Generation:
    """A generated answer. ids: new tokens, without the closing one. text: them decoded, special tokens left out. finished: it ended by itself."""

    ids: list[int]
    text: str
    finished: bool


class ModelService:
    """A model ready to score, embed and generate.

    On a CPU rows are scored one by one, so that a row's numbers do not depend on its neighbours: they are the same bits in every order and after every
    interruption. Two are computed side by side where the layers' kernel allows for it. Batches of eight took 0.76 of the time of single rows before there
    were kernels (135M model, 130 tokens a row); `batch_tokens` asks for them. On a GPU rows are sorted by length and go in batches of at most `batch_tokens`
    padded tokens; a row's loss then varies in the last bits with its batch.

    Args:
        model: causal language model in evaluation mode, perhaps with an adapter.
        tokenizer: its tokenizer.
        max_length: tokens a row is cut to (from the right); by default the model's context.
        batch_tokens: padded tokens of a batch; 0 scores one row at a time. By default 0 on a CPU and `BATCH_TOKENS` elsewhere.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_length: int | None = None, batch_tokens: int | None = None):
        self.model, self.tokenizer = model, tokenizer
        self.device = next(model.parameters()).device
        context = getattr(model.config, "max_position_embeddings", None)
        self.max_length = min(v for v in (max_length, context, 2**30) if v)
        self.batch_tokens = batch_tokens if batch_tokens is not None else (0 if self.device.type == "cpu" else BATCH_TOKENS)
        self._renderer: Renderer | None = None
        self._plain: bool | None = None
        self._lanes: Lanes | None = None
        self._companions: dict[tuple[str, str], ModelService] = {}
        given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        self._ends = sorted({int(e) for e in (*(given if isinstance(given, list) else [given]), tokenizer.eos_token_id) if e is not None})

    @classmethod
    def open(cls, model: str, env: Environment, *, adapter: Path | None = None, dtype: DType = "bfloat16", device: str | None = None,
             max_length: int | None = None) -> ModelService:
        """The service for a model as the configuration names it, with the adapter of a folder if one is given."""
        from ftpipe.models import kernels

        loaded = load_model(model, env, dtype=dtype, device=device) if adapter is None else \
            load_adapted(model, env, adapter, dtype=dtype, device=device, allow_zero=True)
        kernels.install(loaded.requires_grad_(False))
        return cls(loaded, load_tokenizer(model, env), max_length=max_length)

    def companion(self, model: str, env: Environment, *, adapter: Path | None = None) -> ModelService:
        """Another model on the same device and in the same type, loaded once for the life of this service (a decoder's expert)."""
        key = (model, str(adapter or ""))
        if key not in self._companions:
            dtype: DType = "float32" if next(self.model.parameters()).dtype.itemsize == 4 else "bfloat16"
            self._companions[key] = ModelService.open(model, env, adapter=adapter, dtype=dtype, device=str(self.device))
        return self._companions[key]

    @property
    def renderer(self) -> Renderer:
        """Renders rows for this model."""
        if self._renderer is None:
            self._renderer = Renderer(self.tokenizer)
        return self._renderer

    def score(self, rendered: Sequence[Rendered], *, loss: bool = True, embed: bool = False,
              on_batch: Callable[[list[tuple[int, RowScore]]], None] | None = None) -> list[RowScore]:
        """Score rows; the results are in the order given.

        Args:
            loss: compute `nll`; without it the output head never runs.
            embed: compute `embedding`.
            on_batch: called after every batch with (index into `rendered`, score) of its rows, for progress and for saving partial work.
        """
        import torch

        results: list[RowScore | None] = [None] * len(rendered)
        with torch.inference_mode():
            batches = list(self._batches(rendered))
            for batch, scores in zip(batches, self._scored([[rendered[i] for i in batch] for batch in batches], loss, embed)):
                done = list(zip(batch, scores))
                for i, score in done:
                    results[i] = score
                if on_batch:
                    on_batch(done)
        return [r for r in results if r is not None]

    def _scored(self, batches: list[list[Rendered]], loss: bool, embed: bool) -> Iterator[list[RowScore]]:
        """The scores of each batch, in order; several at a time where that changes nothing."""
        import torch

        def one(rows: list[Rendered]) -> list[RowScore]:
            with torch.inference_mode():
                return self._score(rows, loss, embed)

        threads = torch.get_num_threads()
        several = len(batches) > 1 and self._head_is_plain() and possible(self.model, threads)
        if several and self._lanes is None:
            self._lanes = Lanes(threads)
        yield from self._lanes.results(one, batches) if several else map(one, batches)

    def _batches(self, rendered: Sequence[Rendered]) -> Iterator[list[int]]:
        """Indices of the rows that go through the model together."""
        if not self.batch_tokens or not self._head_is_plain():
            yield from ([i] for i in range(len(rendered)))
            return
        lengths = [min(len(r.input_ids), self.max_length) for r in rendered]
        batch: list[int] = []
        for i in sorted(range(len(rendered)), key=lambda i: (-lengths[i], i)):  # longest first: what does not fit in memory fails at once
            if batch and lengths[batch[0]] * (len(batch) + 1) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _score(self, rows: list[Rendered], loss: bool, embed: bool) -> list[RowScore]:
        import torch

        ids = [r.input_ids[: self.max_length] for r in rows]
        if not all(ids):
            raise DataError("a row without tokens cannot be scored", remedy="put a label_audit stage before this one")
        # position t - 1 predicts token t
        where = [[t - 1 for t in range(1, len(i)) if r.trained[t]] for r, i in zip(rows, ids)]
        width = max(map(len, ids))
        pad = self._pad_id()
        tokens = torch.tensor([i + [pad] * (width - len(i)) for i in ids], device=self.device)
        lengths = torch.tensor([len(i) for i in ids], device=self.device)
        mask = None if len({*map(len, ids)}) == 1 else (torch.arange(width, device=self.device)[None] < lengths[:, None]).long()
        batch = torch.tensor([b for b, w in enumerate(where) for _ in w], device=self.device, dtype=torch.long)
        position = torch.tensor([t for w in where for t in w], device=self.device, dtype=torch.long)
        targets = tokens[batch, position + 1]
        if self._head_is_plain():
            hidden = self._decoder()(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
            each = self._losses(hidden[batch, position], targets) if loss else None
        else:
            with self._hidden_states(embed) as seen:
                logits = self.model(input_ids=tokens, use_cache=False).logits[:, -width:]
            hidden = seen[0][:, -width:] if embed else None
            each = torch.nn.functional.cross_entropy(logits[batch, position].float(), targets, reduction="none") if loss else None
        sums: list[float | None] = [None] * len(rows)
        if each is not None:
            sums = torch.zeros(len(rows), dtype=torch.float64, device=self.device).index_add_(0, batch, each.double()).tolist()
        means: list[Any] = [None] * len(rows)
        if embed:
            means = [hidden[b, : len(i)].float().mean(0).cpu().numpy() for b, i in enumerate(ids)]
        return [RowScore(s, len(w), len(i), m) for s, w, i, m in zip(sums, where, ids, means)]

    def _losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(n,) float32 losses from (n, hidden) states, with a bounded number of logits in memory; log-softmax in float32."""
        import torch

        head = self._base().get_output_embeddings()
        step = max(16, CHUNK_FLOATS // head.weight.shape[0])
        parts = [torch.nn.functional.cross_entropy(head(hidden[i:i + step]).float(), targets[i:i + step], reduction="none")
                 for i in range(0, len(hidden), step)]
        return torch.cat(parts) if parts else torch.zeros(0, device=self.device)

    def _base(self) -> Any:
        """The transformers model inside a PEFT wrapper; adapter layers are in it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def _decoder(self) -> Any:
        return self._base().get_decoder()

    def _head_is_plain(self) -> bool:
        """Whether logits are the head applied to the backbone's last hidden state and nothing more."""
        if self._plain is None:
            self._plain = split(self.model) is not None
            if not self._plain:
                log.info("%s does more to its logits than apply its head: rows are scored one at a time with all logits", type(self._base()).__name__)
        return self._plain

    @contextmanager
    def _hidden_states(self, wanted: bool) -> Iterator[list[torch.Tensor]]:
        """Collects the backbone's last hidden states while the model's own forward runs."""
        seen: list[torch.Tensor] = []
        if not wanted:
            yield seen
            return
        try:
            decoder = self._decoder()
        except AttributeError as error:
            raise FtpipeError(f"{type(self.model).__name__} has no backbone whose hidden states could be read", remedy="ask for losses only") from error
        handle = decoder.register_forward_hook(lambda module, args, output: seen.append(output[0]))
        try:
            yield seen
        finally:
            handle.remove()

    def _pad_id(self) -> int:
        return next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)

    def generate(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
                 decoder: Decoder | None = None, env: Environment | None = None, processors: Sequence[Any] = (), batch_size: int = 8,
                 streamer: Any = None, on_batch: Callable[[int, int], None] | None = None) -> list[Generation]:
        """Answers to prompts given as tokens (`renderer.prompt(messages)`), in their order.

        Prompts go through in batches of like length, padded on the left. The same call gives the same answers; with `batch_size=1` an answer depends on its
        prompt, the seed and nothing else, otherwise also (in rounding, or in which random numbers it gets) on its neighbours.

        Args:
            max_new_tokens: most tokens of an answer; the prompt and the answer must fit the model's context, a longer prompt is cut from the left.
            temperature: 0 is greedy decoding; otherwise samples from the distribution at this temperature. top_p: nucleus, with a temperature only.
            decoder: a method of the slot `decode`; replaces temperature and top_p. env: needed by a decoder that loads models.
            processors: further transformers logits processors.
            streamer: a transformers streamer that is handed the tokens as they come; for one prompt at a time.
            on_batch: called after every batch with (prompts done, prompts in all).
        """
        import torch

        from ftpipe.decode.base import DecodeRun

        room = max(1, self.max_length - max_new_tokens)
        cut = [list(p)[-room:] for p in prompts]
        if not all(cut):
            raise DataError("an empty prompt cannot be answered")
        order = sorted(range(len(cut)), key=lambda i: (len(cut[i]), i))
        answers: dict[int, Generation] = {}
        settings: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            settings |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
        if decoder is not None:
            settings = decoder.settings()
        cuda = [self.device] if self.device.type == "cuda" else []
        for start in range(0, len(order), batch_size):
            chosen = order[start:start + batch_size]
            width = max(len(cut[i]) for i in chosen)
            tokens = torch.tensor([[self._pad_id()] * (width - len(cut[i])) + cut[i] for i in chosen], device=self.device)
            mask = torch.tensor([[0] * (width - len(cut[i])) + [1] * len(cut[i]) for i in chosen], device=self.device)
            extra = list(processors)
            if decoder is not None:
                extra = decoder.processors(DecodeRun(service=self, env=env, input_ids=tokens, attention_mask=mask)) + extra
            with torch.inference_mode(), torch.random.fork_rng(devices=cuda), self._own_settings() as config:
                torch.manual_seed(_seed(seed, [cut[i] for i in chosen]))
                config.update(max_new_tokens=max_new_tokens, **settings)
                out = self.model.generate(input_ids=tokens, attention_mask=mask, generation_config=config, logits_processor=extra, streamer=streamer)
            for i, row in zip(chosen, out[:, width:].tolist()):
                answers[i] = self._answer(row)
            if on_batch:
                on_batch(len(answers), len(order))
        return [answers[i] for i in range(len(cut))]

    @contextmanager
    def _own_settings(self) -> Iterator[Any]:
        """Generation settings of nothing but the end tokens. What a model folder brings along (a temperature, a repetition penalty) would otherwise fill in."""
        from transformers import GenerationConfig

        holders = [m for m in {id(m): m for m in (self.model, self._base())}.values() if hasattr(m, "generation_config")]
        before = [m.generation_config for m in holders]
        for m in holders:
            m.generation_config = GenerationConfig()
        try:
            yield GenerationConfig(pad_token_id=self._pad_id(), eos_token_id=self._ends or None, use_cache=True)
        finally:
            for m, config in zip(holders, before):
                m.generation_config = config

    def _answer(self, row: list[int]) -> Generation:
        stop = next((k for k, t in enumerate(row) if t in self._ends), None)
        ids = row[:stop]
        return Generation(ids, self.tokenizer.decode(ids, skip_special_tokens=True), stop is not None)


def _seed(seed: int, prompts: list[list[int]]) -> int:
    """A seed from the run's seed and the prompts, so that an answer does not depend on how many came before."""
    return int.from_bytes(hashlib.sha256(repr((seed, prompts)).encode()).digest()[:8], "big") >> 1
