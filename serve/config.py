"""What the server is told: `ServerConfig`, from flags and a YAML file.

Names and meanings are vLLM's where vLLM has them. Flags win over the file. Nothing here imports
jax, so that `--help` and `--explain` answer at once.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .flags import Parser, check, flag, flag_of, read_file, read_value

DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_DTYPES = ("auto", "fp8", "fp8_e4m3")
LOG_LEVELS = ("critical", "error", "warning", "info", "debug")

USAGE = "python -m serve.server [MODEL] [flags]"
HELP = """\
Serves a Llama model over HTTP as OpenAI's API does, with EAGLE tree speculation.

Speculation changes the speed and nothing else: each text (or, when sampling, its distribution) is
the target's own. Names are vLLM's, so clients and scripts written for vLLM work.

examples
  python -m serve.server
      the demo model with its own draft, on http://127.0.0.1:8000
  python -m serve.server ./llama --speculative-config '{"model": "./eagle", "tree": "static:8"}'
      a model and a draft of yours; a tree of eight nodes in every round
  python -m serve.server ./llama --speculative-config \\
          '{"model": "./eagle", "tree": [[4, "static:8"], [16, "chain:2"], [null, "plain"]]}'
      the tree by the number of running sequences: to 4, to 16, above
  python -m serve.server ./llama --speculative-config none --max-num-seqs 32 --api-key SECRET
      plain decoding, 32 sequences at a time, for those who know the key
  python -m serve.server ./llama -tp 4 -dp 2
      two replicas on four devices each, behind one address
  python -m serve.server ./llama -tp 16 -n 2 --master-addr 10.0.0.1 --node-rank 0
      one model on two hosts; the same on the other one with --node-rank 1
  python -m serve.server --config server.yaml --port 9000
      flags from a file; those on the command line win

  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}], "stream": true}'
"""


@dataclasses.dataclass(frozen=True)
class SpeculativeConfig:
    """The value of --speculative-config."""

    method: str = "eagle"
    model: str = "auto"
    """The draft, as `load_draft` takes it; "auto": the model's own."""
    tree: tuple[tuple[int | None, str], ...] = ((None, "auto"),)
    """(largest number of running sequences, tree), rising; None: any number. "auto" alone: the
    engine's own table."""
    quantization: str | None = None
    """Of the draft's weights, as --quantization says it of the target's."""

    @classmethod
    def parse(cls, value: Any) -> "SpeculativeConfig | None":
        """From JSON or what JSON holds; None for "none" and null.

        Raises:
          ValueError: an unknown key, or a value that cannot be used.
        """
        if value in (None, "none"):
            return None
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ValueError(f"is no JSON ({error})") from None
        if not isinstance(value, dict):
            raise ValueError(f"is {value!r}, expected an object such as {{'tree': 'static:8'}}")
        fields = dict(value)
        count = fields.pop("num_speculative_tokens", None)
        if unknown := sorted(set(fields) - {field.name for field in dataclasses.fields(cls)}):
            raise ValueError(
                f"has the unknown key {unknown[0]!r}, expected method, model, tree, quantization "
                "or num_speculative_tokens"
            )
        if fields.get("method", "eagle") != "eagle":
            raise ValueError(f"has method {fields['method']!r}, expected 'eagle'")
        if not isinstance(fields.get("model", ""), str):
            raise ValueError(f"has model {fields['model']!r}, expected a name or a path")
        if not isinstance(fields.get("quantization"), str | None):
            raise ValueError(f"has quantization {fields['quantization']!r}, expected such as 'fp8'")
        if count is not None:
            if "tree" in fields:
                raise ValueError("has both tree and num_speculative_tokens: give one of them")
            if type(count) is not int or count < 1:
                raise ValueError(f"has num_speculative_tokens {count!r}, expected 1 or more")
            fields["tree"] = f"chain:{count}"
        if "tree" in fields:
            fields["tree"] = _schedule(fields["tree"])
        return cls(**fields)


def _schedule(tree: Any) -> tuple[tuple[int | None, str], ...]:
    """A tree, or [largest number of sequences, tree] pairs, as such pairs."""
    if isinstance(tree, str):
        return ((None, tree),)
    expected = 'expected a tree, or pairs such as [[4, "static:8"], [null, "plain"]]'
    pair = lambda entry: isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)  # noqa: E731
    if not isinstance(tree, list) or not tree or not all(map(pair, tree)):
        raise ValueError(f"has tree {tree!r}, {expected}")
    *limits, last = [limit for limit, _ in tree]
    rising = all(type(limit) is int and limit > 0 for limit in limits)
    if last is not None or not rising or sorted(set(limits)) != limits:
        raise ValueError(f"has tree {tree!r}: the numbers have to rise, and the last one is null")
    return tuple((limit, name) for limit, name in tree)


MODEL, SPECULATION, HTTP, LIMITS, CAPACITY, DEVICES, LOGS = (
    "model", "speculation", "HTTP", "limits of requests", "capacity", "devices and hosts", "logs"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """All settings of a server; every field is a flag and a key of the configuration file."""

    model: str = flag(
        "smollm2-135m-instruct",
        MODEL,
        "a known name, a Hugging Face or Orbax folder, a .gguf file, or org/name on the hub; also "
        "the first argument",
    )
    served_model_name: tuple[str, ...] = flag(
        (), MODEL, "name that clients give (may be repeated; the first is reported); default: MODEL"
    )
    chat_template: str | None = flag(None, MODEL, "file with a Jinja template to use instead")
    dtype: str = flag(
        "auto", MODEL, "of the weights; auto: float32 on a CPU, else bfloat16", choices=DTYPES
    )
    quantization: str | None = flag(
        None,
        MODEL,
        "store weights as fp8, int8 or int4, or by group, such as experts=fp8,mlp=int4; default: "
        "as the checkpoint has them",
        "-q",
    )
    kv_cache_dtype: str = flag(
        "auto", MODEL, "of the KV cache; auto: as --dtype", choices=KV_DTYPES
    )
    generation_config: str = flag(
        "auto",
        MODEL,
        "auto: sampling defaults from the model's generation_config.json; vllm: neutral ones",
        choices=("auto", "vllm"),
    )
    seed: int | None = flag(
        None, MODEL, "makes the seeds of requests that bring none repeatable; default: random"
    )
    speculative_config: SpeculativeConfig | None = flag(
        SpeculativeConfig(),
        SPECULATION,
        'JSON with "model" (the draft), and "tree" or "num_speculative_tokens"; none: off; '
        "default: the model's own draft",
        parse=SpeculativeConfig.parse,
    )

    host: str = flag("127.0.0.1", HTTP, "address to listen on; 0.0.0.0: all")
    port: int = flag(8000, HTTP, "port to listen on; 0: any free one", least=0, most=65535)
    uds: str | None = flag(None, HTTP, "Unix domain socket instead of host and port")
    api_key: tuple[str, ...] = flag(
        (), HTTP, "key that clients must give (may be repeated); /health and /metrics stay open"
    )
    enable_request_id_headers: bool = flag(True, HTTP, "answer with X-Request-Id")
    enable_force_include_usage: bool = flag(False, HTTP, "usage in every stream, asked or not")
    ignore_unknown_fields: bool = flag(
        False, HTTP, "list unknown fields in the answer's ignored_fields instead of refusing them"
    )
    limit_concurrency: int = flag(1024, HTTP, "connections at a time; more get a 503", least=1)
    max_request_body_size: int = flag(4 * 2**20, HTTP, "bytes of a body; more get a 413", least=1)
    stream_timeout: float = flag(
        30.0,
        HTTP,
        "seconds that a client may leave an answer unread, or take to send a body",
        least=0.01,
    )
    shutdown_timeout: float = flag(
        25.0, HTTP, "seconds that running requests get after SIGTERM; 0: none", least=0
    )

    max_model_len: int | None = flag(
        None, LIMITS, "tokens of prompt and answer together; default: the model's", least=2
    )
    request_timeout: float | None = flag(
        600.0, LIMITS, "seconds after which a request ends with what it has", least=0.01
    )
    max_num_queued_reqs: int | None = flag(
        512, LIMITS, "sequences waiting or running; more get a 429", least=1
    )
    max_num_queued_tokens: int | None = flag(
        None, LIMITS, "prompt tokens waiting; more get a 429; default: no limit", least=1
    )

    max_num_seqs: int | None = flag(
        None,
        CAPACITY,
        "sequences decoded together at most; default: 16 on a CPU, 64 on a GPU",
        least=1,
    )
    batch_buckets: tuple[int, ...] = flag(
        (),
        CAPACITY,
        "batch size to compile (may be repeated); default: a few up to --max-num-seqs",
        least=1,
    )
    max_num_batched_tokens: int | None = flag(
        None, CAPACITY, "prompt tokens of one step; default: the engine's choice", least=1
    )
    block_size: int = flag(64, CAPACITY, "tokens of a page of the KV cache", least=1)
    num_gpu_blocks_override: int | None = flag(
        None, CAPACITY, "pages of the KV cache; default: what memory allows", least=1
    )
    gpu_memory_utilization: float = flag(
        0.9, CAPACITY, "share of a GPU's memory to use", least=0.01, most=1.0
    )
    enable_prefix_caching: bool = flag(True, CAPACITY, "share pages of equal prefixes")

    tensor_parallel_size: int = flag(1, DEVICES, "devices to spread the model over", "-tp", least=1)
    data_parallel_size: int = flag(
        1, DEVICES, "replicas of the model, each on devices of its own", "-dp", least=1
    )
    enable_expert_parallel: bool = flag(
        False, DEVICES, "each device holds some experts whole, not a share of every one", "-ep"
    )
    nnodes: int = flag(
        1,
        DEVICES,
        "processes, one a host, that share the devices: start each with the same flags but "
        "--node-rank",
        "-n",
        least=1,
    )
    node_rank: int = flag(
        0, DEVICES, "which of them this is; 0 serves HTTP and leads the others", "-r", least=0
    )
    master_addr: str = flag("127.0.0.1", DEVICES, "address of process 0, for the other ones")
    master_port: int = flag(
        29501, DEVICES, "port of process 0, for the other ones", least=1, most=65535
    )

    log_format: str = flag("text", LOGS, "lines to read, or JSON", choices=("text", "json"))
    uvicorn_log_level: str = flag("info", LOGS, "least level that is logged", choices=LOG_LEVELS)
    disable_access_log_for_endpoints: tuple[str, ...] = flag(
        (), LOGS, "path without a line for each request (may be repeated)"
    )
    log_stats_interval: float = flag(
        10.0, LOGS, "seconds between lines about load and speed; 0: none", least=0
    )

    def __post_init__(self):
        check(self)
        if not all(key and key.isascii() for key in self.api_key):
            raise ValueError("--api-key: expected ASCII characters, and not none of them")
        if self.node_rank >= self.nnodes:
            raise ValueError(f"--node-rank is {self.node_rank}, expected 0 to {self.nnodes - 1}")
        if self.nnodes > 1 and self.data_parallel_size > 1:
            raise ValueError(
                f"--data-parallel-size {self.data_parallel_size} needs --nnodes 1: replicas that "
                "fit on a host are servers of their own"
            )
        if self.tensor_parallel_size % self.nnodes:
            raise ValueError(
                f"--tensor-parallel-size {self.tensor_parallel_size} does not divide over "
                f"--nnodes {self.nnodes}"
            )

    @property
    def model_names(self) -> tuple[str, ...]:
        """What clients may call the model; the first is what answers call it."""
        return self.served_model_name or (self.model,)

    @property
    def shared(self) -> dict[str, Any]:
        """What all processes of a server have to agree on, as JSON holds it."""
        groups, more = (SPECULATION, CAPACITY, DEVICES), ("model", "dtype", "quantization")
        more = (*more, "kv_cache_dtype", "max_model_len")
        fields = [
            field.name
            for field in dataclasses.fields(self)
            if field.metadata["group"] in groups or field.name in more
        ]
        values = {name: value for name, value in dataclasses.asdict(self).items() if name in fields}
        del values["node_rank"]
        return json.loads(json.dumps(values))


@dataclasses.dataclass(frozen=True)
class Command:
    """What the command line asks for: a server, or a text to print."""

    config: ServerConfig
    show: str | None = None
    """explain | version; None: serve."""


def parse(arguments: Sequence[str]) -> Command:
    """Reads the command line, and the file of --config.

    Raises:
      ValueError: an unknown flag or key, or a value that cannot be used.
      SystemExit: --help, once it is printed.
    """
    given = vars(_parser().parse_args(arguments))
    show = next((name for name in ("explain", "version") if given.pop(name, False)), None)
    path, first = given.pop("config", None), given.pop("MODEL", None)
    if first is not None:
        if "model" in given:
            raise ValueError("the model is given twice: as MODEL and as --model")
        given["model"] = first
    values = read_file(ServerConfig, Path(path)) if path else {}
    for name, value in given.items():
        values[name] = read_value(ServerConfig, name, value, flag_of(name))
    return Command(ServerConfig(**values), show)


def _parser() -> Parser:
    parser = Parser(ServerConfig, prog="serve.server", usage=USAGE, description=HELP)
    parser.add_argument("MODEL", nargs="?", help=argparse.SUPPRESS)
    about = parser.about.add_argument
    about("-h", "--help", action="help", help="show this text")
    about("--version", action="store_true", help="show the version")
    text = "show which features of a request go together, and what is refused"
    about("--explain", action="store_true", help=text)
    about("--config", metavar="FILE", help="flags from a YAML file")
    return parser
