"""What the tests of the server share: a scripted service, a tiny model, a server of it."""

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from benchmarks.equal_text import compare
from benchmarks.server_process import ServerProcess
from jax_eagle import Draft, SamplingParams, Target, generate, load_target
from jax_eagle.checkpoint import eagle, hf
from jax_eagle.checkpoint.mapping import draft_entries, nested, target_entries
from jax_eagle.config import DraftConfig, LlamaConfig
from jax_eagle.tokenizer import Tokenizer, _fast_tokenizer
from serve.api import Api
from serve.config import ServerConfig
from serve.features import Feature
from serve.lifecycle import _settings, _Uvicorn
from serve.request import (
    Delta,
    Draining,
    EngineStatus,
    QueueFull,
    Request,
    RequestStats,
    TokenLogprob,
)

ROOT = Path(__file__).parent.parent
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and loop.first %}"
    "{{ raise_exception('the user speaks first') }}{% endif %}"
    "{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def byte_tokenizer(
    template: str = TEMPLATE, special: Sequence[str] = ("<assistant>", "<end>")
) -> Tokenizer:
    """One token a byte, the special ones behind them, and a chat template.

    By default the end of text is 257.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return Tokenizer(_fast_tokenizer()(tokenizer_object=backend, chat_template=template))


TINY = LlamaConfig(
    vocab_size=258, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=8, max_position=256, stop_token_ids=(257,),
)  # fmt: skip


def save_tiny_model(
    folder: Path, max_position: int = 256, config: LlamaConfig = TINY, favourites: int = 0
) -> None:
    """A random model of byte tokens, `target`, and a random draft for it, `draft`.

    Tokens below `favourites` are likely everywhere, so that the draft is right now and then.
    """
    config = dataclasses.replace(config, max_position=max_position)
    rng = np.random.default_rng(0)

    def random(entries):
        return nested({e.path: rng.normal(0, 0.3, e.shape).astype("f") for e in entries})

    target = Target(random(target_entries(config)), config, byte_tokenizer())
    target.params["lm_head"]["kernel"][:, :favourites] *= 10
    hf.save(target, folder / "target")
    of_draft = DraftConfig.for_target(config)
    params = random(draft_entries(of_draft))
    eagle.save(Draft(params=params, draft_to_target=None, config=of_draft), folder / "draft")


class ScriptedService:
    """A service without an engine: it says its prompt again, token by token.

    `reason` is what requests end with, `delay` the seconds before each token, `room` how many may
    run. What happened is in `requests`, `open` (ids that run), `aborted`, `forgotten`.
    """

    model = "scripted"
    max_model_len, vocab_size, stop_token_ids = 200, 258, (257,)
    trees = ("chain:2", "static:3", "plain")

    def __init__(self, *, reason: str = "length", delay: float = 0.0, room: int = 1000):
        self.tokenizer = byte_tokenizer()
        self.reason, self.delay, self.room = reason, delay, room
        self.ready = True
        self.forgotten = 0
        self.requests: list[Request] = []
        self.open: set[str] = set()
        self.aborted: list[str] = []

    async def start(self) -> None:
        pass

    def submit(self, requests: Sequence[Request]) -> list["ScriptedDeltas"]:
        if not self.ready:
            raise Draining
        if len(self.open) + len(requests) > self.room:
            raise QueueFull(retry_after=7.0)
        self.requests += requests
        self.open |= {request.id for request in requests}
        return [ScriptedDeltas(self, request) for request in requests]

    def statuses(self) -> list[EngineStatus]:
        return [self.status()]

    def status(self) -> EngineStatus:
        return EngineStatus(
            running=len(self.open), waiting=2, kv_usage=0.25, prompt_tokens=10,
            generation_tokens=20, rounds_by_tree={"static:3": 5, "plain": 1},
            draft_tokens_by_tree={"static:3": 10}, accepted_by_tree={"static:3": 4},
            accepted_by_depth=(3, 1), accepted_by_rank=(3, 1), steps=6, step_seconds=2.0,
            wait_seconds=1.5,
        )  # fmt: skip

    def forget_prefixes(self) -> None:
        self.forgotten += 1

    async def drain(self, timeout: float) -> None:
        self.ready = False
        end = time.monotonic() + timeout
        while self.open and time.monotonic() < end:
            await asyncio.sleep(0.01)


class ScriptedDeltas:
    """The deltas of one request."""

    engine = 0

    def __init__(self, service: ScriptedService, request: Request):
        self._service, self._request, self._next = service, request, 0

    def __aiter__(self) -> "ScriptedDeltas":
        return self

    async def __anext__(self) -> Delta:
        service, request = self._service, self._request
        await asyncio.sleep(service.delay)
        if request.id not in service.open:
            raise StopAsyncIteration
        token = request.prompt[self._next % len(request.prompt)]
        self._next += 1
        last = self._next == request.max_tokens
        logprob = TokenLogprob(-0.5, ((token, -0.5), (7, -1.5))[: request.logprobs])
        if last:
            service.open.discard(request.id)
        return Delta(
            text=service.tokenizer.decode([token], skip_special_tokens=True),
            token_ids=(token,),
            logprobs=None if request.logprobs is None else (logprob,),
            finish_reason=service.reason if last else None,
            stats=stats(len(request.prompt), self._next) if last else None,
        )

    async def aclose(self) -> None:
        if self._request.id in self._service.open:
            self._service.open.discard(self._request.id)
            self._service.aborted.append(self._request.id)


def stats(prompt: int, new: int) -> RequestStats:
    return RequestStats(
        prompt_tokens=prompt, cached_tokens=1, new_tokens=new, rounds=new, drafts=10,
        draft_tokens=30, accepted_by_depth=(6, 2), queue_seconds=0.1, prefill_seconds=0.2,
        decode_seconds=0.3,
    )  # fmt: skip


def example(body: Mapping, tree: str, *features: Feature) -> dict:
    """`body` with the fields that ask for all of the features."""
    body = dict(body)
    for feature in features:
        fields = json.loads(json.dumps(feature.example).replace("{tree}", tree))
        if "prompt" in fields and isinstance(body["prompt"], list):
            fields["prompt"] = [[11, 12], [13]]  # several prompts of token ids
        if "speculative" in body and "speculative" in fields:
            fields["speculative"] |= body["speculative"]
        body |= fields
    return body


@dataclasses.dataclass
class Hosted:
    """An `Api` on a free loopback port, in a thread of this process."""

    api: Api
    service: ScriptedService
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def hosted(service: ScriptedService, config: ServerConfig | None = None) -> Iterator[Hosted]:
    """Serves a scripted service."""
    config = config or ServerConfig()
    api = Api(config)
    api.attach(service, {})  # type: ignore[arg-type]
    listener = socket.create_server(("127.0.0.1", 0))
    server = _Uvicorn(_settings(config, api))
    thread = threading.Thread(target=asyncio.run, args=[server.serve(sockets=[listener])])
    thread.start()
    try:
        yield Hosted(api, service, listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        listener.close()
        assert not thread.is_alive()


def tiny_flags(folder: Path, *, tree: str = "static:3") -> list[str]:
    """Flags of a server of the tiny model in `folder`: few programs, which are compiled once."""
    speculation = json.dumps({"model": str(folder / "draft"), "tree": tree})
    return [
        str(folder / "target"), "--served-model-name", "tiny", "--speculative-config", speculation,
        "--max-num-seqs", "4", "--batch-buckets", "4",
    ]  # fmt: skip


def tiny_server(folder: Path, *flags: str) -> ServerProcess:
    """A process that serves the tiny model, warm."""
    save_tiny_model(folder)
    server = ServerProcess(*tiny_flags(folder), *flags)
    server.wait_until_ready()
    return server


PROMPTS = [[72, 105], [1] * 30, [200, 7, 7, 90], [65, 66, 67] * 6, [250], [30, 20, 10, 5, 2, 1]]
SAMPLING = [
    SamplingParams(),
    SamplingParams(temperature=0.8, top_p=0.9, seed=7),
    SamplingParams(temperature=1.0, top_k=20, presence_penalty=1.0, seed=3),
]
NEW_TOKENS = 14


def asked() -> tuple[list[list[int]], list[SamplingParams]]:
    """Each prompt, greedy and sampled."""
    prompts, sampling = zip(*itertools.product(PROMPTS, SAMPLING), strict=True)
    return list(prompts), list(sampling)


@functools.cache
def text_of_one_device(folder: Path, **options) -> tuple[Target, list[list[int]]]:
    """The target in a folder of `save_tiny_model`, and its answers to what is `asked`.

    A draft does not matter to the text, so there is none here. `options` are those of loading.
    """
    target, (prompts, sampling) = load_target(folder / "target", **options), asked()
    result = generate(target, None, prompts, max_new_tokens=NEW_TOKENS, sampling=sampling)
    return target, result.tokens


def assert_serves_text_of_one_device(url: str, folder: Path, **options) -> None:
    """Requests all at once: *equal text* with `generate` on one device."""
    target, expected = text_of_one_device(folder, **options)
    prompts, sampling = asked()

    def ask(client: httpx2.Client, prompt: list[int], own: SamplingParams) -> list[int]:
        body = {
            "prompt": prompt, "max_tokens": NEW_TOKENS, "return_token_ids": True,
            "temperature": own.temperature, "top_p": own.top_p, "top_k": own.top_k,
            "presence_penalty": own.presence_penalty, "seed": own.seed,
        }  # fmt: skip
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["token_ids"]

    with httpx2.Client(base_url=url, timeout=120) as client, ThreadPoolExecutor(12) as pool:
        given = list(pool.map(functools.partial(ask, client), prompts, sampling))
        values = metrics(client)
    comparison = compare(target, prompts, expected, given, sampling=sampling)
    print(comparison)
    assert comparison.equal, comparison
    assert not any(v for k, v in values.items() if k[0] == "jax_eagle:leaked_pages")
    assert not any(v for k, v in values.items() if k[0].startswith("jax_eagle:compilations"))
    assert any(v for k, v in values.items() if k[0].endswith("num_accepted_tokens_total"))


def metrics(client: httpx2.Client) -> dict[tuple[str, str], float]:
    """The samples of /metrics that say which engine they are of, by name and engine."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        (s.name, s.labels["engine"]): s.value
        for family in families
        for s in family.samples
        if "engine" in s.labels
    }
