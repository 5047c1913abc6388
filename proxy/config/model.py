"""The section `models.NAME`: one model that clients can name."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import Field, SecretStr, model_validator

from proxy.config.calls import AsleepSettings, CanaryRequestSettings, OrderSettings, TokensSettings
from proxy.config.document import ENGINE_TABLES
from proxy.config.engine import (
    HealthSettings,
    PodmanEngineSettings,
    ProcessEngineSettings,
    ReseedSettings,
    WarmupSettings,
)
from proxy.config.extra_routes import ExtraRouteSettings, covers
from proxy.config.fields import (
    AbsolutePath,
    Count,
    Duration,
    Memory,
    OptionalDuration,
    PositiveInt,
    Section,
    TimesOfDay,
)
from proxy.config.values import lies_in
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Mapping

_WORKER_EXTENSION: Final = "--worker-extension-cls"
_SLEEP_MODE: Final = "--enable-sleep-mode"
_VISIBLE: Final = ("NVIDIA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
_PARALLEL: Final = frozenset(
    {"--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--data-parallel-size", "-dp"}
)
"""Options of vLLM's that say over how many GPUs an engine is spread."""


class IdleSettings(Section):
    """The idle timetable: how long after its last request an instance steps down to each tier."""

    sleeping: OptionalDuration = Field(
        default=30.0, description="Asleep by the engine's own sleep mode, where it has one."
    )
    suspended: OptionalDuration = Field(default=120.0, description="Suspended: frozen, and its GPU memory in host RAM.")
    checkpointed: OptionalDuration = Field(default=600.0, description="Checkpointed: an image on tmpfs, no process.")
    archived: OptionalDuration = Field(
        default=None, description="Archived: the image compressed on disk, in pool.archive_dir."
    )
    stopped: OptionalDuration = Field(
        default=None, description="Stopped: the instance is removed, and its image unless other instances share it."
    )

    @model_validator(mode="after")
    def _colder_is_later(self) -> IdleSettings:
        previous_name, previous_s = "", 0.0
        for name in ("sleeping", "suspended", "checkpointed", "archived", "stopped"):
            after_s = getattr(self, name)
            if after_s is None:
                continue
            if after_s < previous_s:
                raise ValueError(f"{name} comes before {previous_name}: a colder tier must have the longer time")
            previous_name, previous_s = name, after_s
        return self

    def timetable(self) -> Mapping[Tier, float]:
        """Tier → seconds of idleness after which an instance should be there; tiers set to "never" are missing."""
        times = {
            Tier.SLEEPING: self.sleeping,
            Tier.SUSPENDED: self.suspended,
            Tier.CHECKPOINTED: self.checkpointed,
            Tier.ARCHIVED: self.archived,
            Tier.STOPPED: self.stopped,
        }
        return {tier: after_s for tier, after_s in times.items() if after_s is not None}


class RouteSettings(Section):
    """What of a model clients may use; engine routes that are not here are never forwarded."""

    chat: bool = Field(default=True, description="/v1/chat/completions, and /batch and /render below it.")
    completions: bool = Field(default=True, description="/v1/completions and /render below it.")
    responses: bool = Field(
        default=True, description="/v1/responses and /render below it, a response by its id, and /cancel below that."
    )
    messages: bool = Field(
        default=True, description="/v1/messages (Anthropic's API), /count_tokens and /render below it."
    )
    audio: bool = Field(default=True, description="/v1/audio/transcriptions and /v1/audio/translations.")
    realtime: bool = Field(default=True, description="/v1/realtime (WebSocket).")
    embeddings: bool = Field(default=True, description="/v1/embeddings and /v2/embed.")
    rerank: bool = Field(default=True, description="/rerank, /v1/rerank and /v2/rerank.")
    score: bool = Field(default=True, description="/score, /v1/score and /generative_scoring.")
    classify: bool = Field(default=True, description="/classify.")
    pooling: bool = Field(default=True, description="/pooling.")
    tokenize: bool = Field(default=True, description="/tokenize, /detokenize and /tokenizer_info.")
    systemone: bool = Field(default=True, description="/v1/systemone (structured decisions).")
    invocations: bool = Field(
        default=True,
        description="/invocations (SageMaker's route to chat, completions, embeddings, rerank, score, classify and "
        "pooling): only where none of these is off.",
    )
    lora: bool = Field(
        default=False,
        description="/v1/load_lora_adapter and /v1/unload_lora_adapter: clients may then have the engine load files.",
    )


class ParameterSettings(Section):
    """What becomes of the parameters of requests for text: chat, completions, responses and messages."""

    defaults: dict[str, Any] = Field(
        default={}, description="Set where a request has none: { temperature = 0.7, max_tokens = 512 }."
    )
    caps: dict[str, int | float] = Field(
        default={}, description="Larger numbers are lowered to this: { max_tokens = 4096, n = 4 }."
    )
    remove: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[], description='Left out of every request: ["logit_bias", "vllm_xargs"].'
    )

    @model_validator(mode="after")
    def _agree(self) -> ParameterSettings:
        for table in ("defaults", "caps", "remove"):
            if "model" in getattr(self, table):
                raise ValueError(f"{table}: `model` is not a parameter; use `name` and `aliases`")
        for name in self.remove:
            if name in self.defaults or name in self.caps:
                raise ValueError(f"remove: {name!r} has a default or a cap too; keep one of them")
        for name, cap in self.caps.items():
            default = self.defaults.get(name, cap)
            if isinstance(default, bool) or not isinstance(default, int | float) or default > cap:
                raise ValueError(f"defaults: {name} must be a number up to its cap, {cap}")
        return self

    @property
    def present(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.defaults or self.caps or self.remove)

    def names(self) -> list[str]:
        """Every parameter that is looked at."""
        return [*self.defaults, *self.caps, *self.remove]


class ModelSettings(Section):
    """One model that clients can name."""

    name: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="The name clients use; default is the table's key.",
        examples=["org/Model-7B"],
    )
    aliases: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        default=[], description="Further names for it."
    )
    adapters: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        default=[], description="Names of LoRA adapters that the engine has; requests for them go on as they are."
    )
    info: dict[str, Any] = Field(
        default={},
        description="Anything to be told of it to who lists models, as `meta` in /v1/models: "
        '{ description = "For code", context = 32768 }.',
    )
    max_instances: PositiveInt = Field(default=1, description="How many engines of it there may be.")
    min_ready: Count = Field(default=0, description="How many engines are kept ready, requests or not.")
    max_concurrency: PositiveInt = Field(default=256, description="Requests one engine is given at once.")
    max_queue: PositiveInt = Field(default=1000, description="How many requests may wait for it.")
    queue_timeout: Duration = Field(default=300.0, description="How long a request waits for an engine before 503.")
    max_wait: Duration = Field(
        default=60.0,
        description="How long a request should wait at most while other models run: whose time is up first is served "
        "first.",
    )
    fallback: str | None = Field(
        default=None,
        min_length=1,
        description="Another model, by its key or name, that answers instead when this one cannot be started for "
        "now, is drained, or would let a request wait for longer than fallback_wait.",
        examples=["contained"],
    )
    fallback_wait: OptionalDuration = Field(
        default=None, description="How long a request would have to wait for this model before fallback answers it."
    )
    evictable: bool | list[TimesOfDay] = Field(
        default=True,
        description="Whether an instance that is ready may step down, or be paused, for another model: true, false, or "
        'only at these times of the day on this host: ["19:00-07:30"].',
    )
    max_keep_alive: OptionalDuration = Field(
        default=3600.0,
        description="The longest time that a client may have an instance stay ready after its request, with the header "
        "x-warmpool-keep-alive; never: the header is not looked at. Other models take its place all the same.",
    )
    start_timeout: Duration = Field(default=600.0, description="How long a cold start may take.")
    wake_timeout: Duration = Field(
        default=60.0, description="How long any other tier may take to wake, or to step down to."
    )
    checkpoint_timeout: Duration = Field(default=300.0, description="How long writing a checkpoint may take.")
    response_timeout: OptionalDuration = Field(
        default=None,
        description="How long an engine may be silent within an answer before that answer is ended; if no other one "
        "got a byte in that time, the engine counts as broken and is replaced.",
    )
    stall_after: OptionalDuration = Field(
        default=600.0,
        description="How long an engine with running requests may send none of them a byte before it is looked at. It "
        "is replaced only if it answers no request for one token within wake_timeout, and its own counters of tokens "
        "and the CPU time of its processes stand still; or if its processes were stopped or its container was paused.",
    )
    canary: Literal["first", "always", "never"] = Field(
        default="first",
        description="Whether a restored engine must repeat a known answer before it serves: "
        "once per image, each time, never.",
    )
    golden_sleep_level: Literal[1, 2] = Field(
        default=2,
        description="How an engine with a sleep mode sleeps until its checkpoint is written, and in it: 2 drops the "
        "weights, which are loaded again when it is woken; 1 keeps them in memory, and so in the checkpoint.",
    )
    sleep_level: Literal[1, 2] = Field(
        default=1,
        description="How it sleeps once there is a checkpoint: 1 keeps the weights of each instance in pinned memory; "
        "2, with weights_copy only, drops them, and all instances are woken from the one copy.",
    )
    weights: list[AbsolutePath] = Field(
        default=[],
        description="Folders with the model's *.safetensors on this host: read ahead while an engine is restored, so "
        "that its weights come from memory.",
    )
    weights_copy: bool = Field(
        default=False,
        description="vLLM with --enable-sleep-mode only: keep a copy of the weights, as they lie on the GPU, in "
        "pool.checkpoint_dir, from which several threads bring them back, instead of having vLLM load them again. "
        "Needs as much memory there as the weights take.",
    )
    gpu_memory: Annotated[Memory, Field(ge=1)] | None = Field(
        default=None,
        description="GPU memory that one engine takes on each of `gpus` when it is ready. Only used until it was "
        "measured: here, or for the checkpoint.",
        examples=["72GiB"],
    )
    host_memory: Annotated[Memory, Field(ge=1)] | None = Field(
        default=None,
        description="Host memory that one engine's processes take when it is ready. Only used until it was measured.",
        examples=["6GiB"],
    )
    gpus: Annotated[list[Count], Field(min_length=1)] = Field(
        default=[0], description="The GPUs that gpu_memory is about, by the driver's index."
    )
    keep: bool = Field(
        default=True,
        description="Keep the checkpoint once it was restored. Without, its memory is free while the engine runs, and "
        "the next step down writes it again; only for one instance.",
    )
    engine: Literal["vllm", "generic"] | None = Field(
        default=None,
        description="What the engine is. vLLM is given a worker extension and a middleware of warmpool's (arguments "
        "added to its command), by which it gets fresh randomness after a restore. Without: vllm where a word of the "
        "command or entry point is `vllm` (or a module of it), or the container image with its own entry point is "
        "called so; else it is asked for vLLM's sleep mode, and nothing is added to its command. A "
        "generic engine has what `sleep`, `wake_up`, `reseed`, `canary_request` and `tokens` name, and nothing else.",
        examples=["generic"],
    )
    api_key: SecretStr | None = Field(
        default=None,
        description="The API key that the engine asks for (vLLM: --api-key or VLLM_API_KEY, given to it in `env`). It "
        "goes with every request to the engine, clients' too, whose own keys never go there.",
        examples=["EXAMPLE-KEY"],
    )
    api_key_file: AbsolutePath | None = Field(
        default=None,
        description="A file with that key instead, which nobody else may read (mode 0600). Read when an engine is "
        "reached for the first time.",
        examples=["/etc/warmpool/engine-key"],
    )
    reseed: ReseedSettings = ReseedSettings()
    sleep: OrderSettings = OrderSettings()
    wake_up: OrderSettings = OrderSettings()
    asleep: AsleepSettings = AsleepSettings()
    canary_request: CanaryRequestSettings = CanaryRequestSettings()
    tokens: TokensSettings = TokensSettings()
    routes: RouteSettings = RouteSettings()
    extra_routes: list[ExtraRouteSettings] = Field(
        default=[], description="Routes of the engine that are not on warmpool's list, as tables."
    )
    parameters: ParameterSettings = ParameterSettings()
    idle: IdleSettings = IdleSettings()
    health: HealthSettings = HealthSettings()
    warmup: WarmupSettings = WarmupSettings()
    process: ProcessEngineSettings | None = Field(default=None, description="The engine, as a local process.")
    podman: PodmanEngineSettings | None = Field(default=None, description="The engine, in a podman container.")

    @model_validator(mode="after")
    def _consistent(self) -> ModelSettings:
        tables = [name for name in ENGINE_TABLES if getattr(self, name) is not None]
        if not tables:
            raise ValueError("no engine: add a table `process` or `podman` with a `command`")
        if len(tables) > 1:
            raise ValueError(f"more than one engine: keep one of the tables {', '.join(tables)}")
        if self.min_ready > self.max_instances:
            raise ValueError(f"min_ready is {self.min_ready}, more than max_instances ({self.max_instances})")
        if self.sleep_level == 2 and not self.weights_copy:
            raise ValueError("sleep_level = 2 needs weights_copy: the weights would be read from files at every wake")
        if self.weights_copy and self.golden_sleep_level != 2:
            raise ValueError("weights_copy needs golden_sleep_level = 2: at 1 the checkpoint holds the weights already")
        self._check_engine()
        self._check_extra_routes()
        if self.max_instances > 1:
            self._check_several()
        return self

    def _check_engine(self) -> None:
        if self.api_key is not None and not re.fullmatch(r"[!-~]{1,4096}", self.api_key.get_secret_value()):
            raise ValueError("api_key must be one word of printable ASCII, at most 4096 characters")
        if self.engine == "vllm" and (given := [*self._own_calls(), *["reseed"] * self.reseed.present]):
            raise ValueError(f'{given[0]} is for engines that are not vLLM: remove it, or set engine = "generic"')
        if self.sleep.present != self.wake_up.present:
            lacks, has = ("wake_up", "sleep") if self.sleep.present else ("sleep", "wake_up")
            raise ValueError(f"{has} needs {lacks}: an engine that sleeps has to be woken")
        if self.asleep.present and not self.sleep.present:
            raise ValueError("asleep needs sleep and wake_up: without, the engine has no sleep mode")
        if self.weights_copy and self.engine_kind == "generic":
            raise ValueError('weights_copy needs vLLM: remove it, or set engine = "vllm"')
        if self.weights_copy and self.own_worker_extension:
            raise ValueError(f"weights_copy needs warmpool's own worker extension: remove {_WORKER_EXTENSION}")

    def _check_extra_routes(self) -> None:
        ways = (self.sleep, self.wake_up, self.asleep, self.reseed, self.health, self.tokens)
        private = {way.path.partition("?")[0] for way in ways if way.path is not None}
        for route in self.extra_routes:
            for path in private:
                if path == route.path or covers(route.path, path):
                    raise ValueError(f"extra_routes: {path} is how warmpool asks the engine: clients must not reach it")

    def _check_several(self) -> None:
        if not self.keep:
            raise ValueError("keep = false needs max_instances = 1: the others would have no checkpoint")
        if self.podman is not None and self.podman.network == "host":
            raise ValueError('podman.network = "host" needs max_instances = 1: clones would share one port')
        if self.podman is not None and self.podman.criu.tcp_established:
            raise ValueError("podman.criu.tcp_established needs max_instances = 1: connections cannot be cloned")

    def evictable_at(self, minute: int) -> bool:
        """Whether an instance may make room for another model at a minute of the day."""
        if isinstance(self.evictable, bool):
            return self.evictable
        return any(lies_in(times, minute) for times in self.evictable)

    @property
    def never_evictable(self) -> bool:
        """Whether no minute of a day is one at which an instance makes room."""
        return self.evictable is False or self.evictable == []

    @property
    def engine_kind(self) -> Literal["vllm", "generic", "unstated"]:
        """What its engines are, by what is said or seen; `proxy.engine.kinds` has one of each."""
        if self.engine is not None:
            return self.engine
        if self._own_calls():
            return "generic"
        return "vllm" if self.weights_copy or (not self.reseed.present and self._looks_like_vllm()) else "unstated"

    def _own_calls(self) -> list[str]:
        """The keys by which it says itself how its engine is asked for what others have in a way that is known."""
        calls = {
            "sleep": self.sleep.present,
            "wake_up": self.wake_up.present,
            "asleep": self.asleep.present,
            "canary_request": self.canary_request.present,
            "tokens": self.tokens.present,
            "health.command": bool(self.health.command),
        }
        return [name for name, present in calls.items() if present]

    def _names_vllm(self) -> bool:
        return any(PurePath(word).name == "vllm" or word.startswith("vllm.entrypoints.") for word in self._words())

    def _looks_like_vllm(self) -> bool:
        image = self.podman.image if self.podman is not None and self.podman.entrypoint is None else ""
        return self._names_vllm() or "vllm" in PurePath(image).name

    def _words(self) -> list[str]:
        """The command, behind the entry point if it is given."""
        if self.podman is not None:
            return [*(self.podman.entrypoint or ()), *self.podman.command]
        return self.process.command if self.process is not None else []

    def names_option(self, option: str) -> bool:
        """Whether the command has this option of vLLM's, however it is spelled."""
        return any(word.partition("=")[0].replace("_", "-") == option for word in self._words())

    @property
    def gpus_an_engine(self) -> int:
        """How many GPUs the command has vLLM spread one engine over."""
        count, words = 1, self._words()
        for number, word in enumerate(words):
            name, equals, value = word.replace("_", "-").partition("=")
            if name in _PARALLEL:
                value = value if equals else "".join(words[number + 1 : number + 2])
                count *= int(value) if value.isascii() and value.isdigit() else 1
        return max(1, count)

    @property
    def names_its_gpus(self) -> bool:
        """Whether its engines are told which GPUs to use, so that others have no place in them."""
        table = self.podman or self.process
        devices = self.podman.devices if self.podman is not None else []
        if any(re.search(r"nvidia\.com/gpu=(?!all$)|^/dev/nvidia\d", device) for device in devices):
            return True
        named = {
            name: table.env[name].get_secret_value() for name in _VISIBLE if table is not None and name in table.env
        }
        return any(value not in ("", "all") for value in named.values())

    @property
    def own_worker_extension(self) -> str | None:
        """The option by which the command gives vLLM a worker extension of the user's own."""
        names = (word.partition("=")[0].replace("_", "-") for word in self._words())
        return next((word for word, name in zip(self._words(), names, strict=True) if name == _WORKER_EXTENSION), None)

    @property
    def lacks_sleep_mode(self) -> bool:
        """Whether the command starts vLLM itself, with all options in it, and without its sleep mode."""
        words = [word.replace("_", "-") for word in self._words()]
        known = self._names_vllm() and not any(word.partition("=")[0] == "--config" for word in words)
        return known and not any(_SLEEP_MODE in word for word in words)

    @property
    def runtime(self) -> str:
        """The name of the runtime that starts its engines."""
        return next(name for name in ENGINE_TABLES if getattr(self, name) is not None)
