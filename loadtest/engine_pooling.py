"""The load-test engine's numbers: embeddings, scores, rankings, classes, tokens."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any, Final

from loadtest import engine_text as text
from loadtest.engine_completions import prompt_of
from loadtest.engine_wire import answer, bad, object_of

if TYPE_CHECKING:
    from aiohttp import web

    from loadtest.engine import Engine

DIMENSIONS: Final = 64
CLASSES: Final = ("amber", "green", "red")


class Pooling:
    """vLLM's routes of pooling models, and of the tokenizer."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        """OpenAI's."""
        body, model, inputs = await self._inputs(request)
        vectors = [text.embed(model, i, DIMENSIONS) for i in inputs]
        packed = body.get("encoding_format") == "base64"
        data = [
            {"index": i, "object": "embedding", "embedding": text.pack_embedding(v) if packed else v}
            for i, v in enumerate(vectors)
        ]
        return self._answer("embd", model, inputs, object="list", data=data)

    async def embed(self, request: web.Request) -> web.StreamResponse:
        """Cohere's `/v2/embed`."""
        _, model, inputs = await self._inputs(request, "texts")
        vectors = [text.embed(model, i, DIMENSIONS) for i in inputs]
        return self._answer("embd", model, inputs, embeddings={"float": vectors}, texts=inputs)

    async def pooling(self, request: web.Request) -> web.StreamResponse:
        _, model, inputs = await self._inputs(request)
        data = [
            {"index": n, "object": "pooling", "data": text.embed(model, i, DIMENSIONS)} for n, i in enumerate(inputs)
        ]
        return self._answer("pool", model, inputs, object="list", data=data)

    async def classify(self, request: web.Request) -> web.StreamResponse:
        _, model, inputs = await self._inputs(request)
        data = []
        for index, given in enumerate(inputs):
            weights = [abs(x) for x in text.embed(model, given, len(CLASSES))]
            probs = [w / sum(weights) for w in weights]
            label = CLASSES[probs.index(max(probs))]
            data.append({"index": index, "label": label, "probs": probs, "num_classes": len(CLASSES)})
        return self._answer("classify", model, inputs, object="list", data=data)

    async def score(self, request: web.Request) -> web.StreamResponse:
        body = await object_of(request)
        model = self.engine.check_model(body)
        ones, others = _strings(body, "text_1"), _strings(body, "text_2")
        pairs = list(zip(ones * len(others) if len(ones) == 1 else ones, others, strict=False))
        data = [{"index": i, "object": "score", "score": _likeness(model, a, b)} for i, (a, b) in enumerate(pairs)]
        return self._answer("score", model, [*ones, *others], object="list", data=data)

    async def score_items(self, request: web.Request) -> web.StreamResponse:
        """`/generative_scoring`."""
        body, model, items = await self._inputs(request, "items")
        query = body.get("query")
        if not isinstance(query, str):
            raise bad("query must be a string", "query")
        data = [{"index": i, "object": "score", "score": _likeness(model, query, item)} for i, item in enumerate(items)]
        return self._answer("generative-scoring", model, [query, *items], object="list", data=data)

    async def decide(self, request: web.Request) -> web.StreamResponse:
        """`/v1/systemone`: an answer to each question."""
        body = await object_of(request)
        model, questions = self.engine.check_model(body), body.get("questions")
        if not isinstance(questions, dict) or not questions:
            raise bad("questions must be an object that is not empty", "questions")
        answers = {name: {"score": _likeness(model, str(body.get("state")), name)} for name in questions}
        return self._answer("sd", model, [*questions], object="structured_decision", answers=answers)

    async def rerank(self, request: web.Request) -> web.StreamResponse:
        body = await object_of(request)
        model = self.engine.check_model(body)
        query, documents = body.get("query"), _strings(body, "documents")
        if not isinstance(query, str):
            raise bad("query must be a string", "query")
        results: list[dict[str, Any]] = [
            {"index": i, "document": {"text": d}, "relevance_score": _likeness(model, query, d)}
            for i, d in enumerate(documents)
        ]
        results.sort(key=lambda result: result["relevance_score"], reverse=True)
        return self._answer("rerank", model, [query, *documents], results=results[: body.get("top_n") or len(results)])

    async def tokenize(self, request: web.Request) -> web.StreamResponse:
        body = await object_of(request)
        self.engine.check_model(body)
        tokens = text.tokenize(prompt_of(body, chat="messages" in body))
        length = self.engine.options.max_model_len
        return answer({"count": len(tokens), "max_model_len": length, "tokens": tokens, "token_strs": None})

    async def detokenize(self, request: web.Request) -> web.StreamResponse:
        body = await object_of(request)
        self.engine.check_model(body)
        tokens = body.get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(t, int) for t in tokens):
            raise bad("tokens must be a list of integers", "tokens")
        try:
            return answer({"prompt": text.detokenize(tokens)})
        except ValueError as error:
            raise bad(str(error), "tokens") from error

    async def tokenizer_info(self, _: web.Request) -> web.StreamResponse:
        return answer({"tokenizer_class": "ThreeBytes", "model_max_length": self.engine.options.max_model_len})

    async def _inputs(self, request: web.Request, name: str = "input") -> tuple[dict[str, Any], str, list[str]]:
        body = await object_of(request)
        return body, self.engine.check_model(body), _strings(body, name)

    def _answer(self, kind: str, model: str, inputs: list[str], **fields: Any) -> web.Response:
        tokens = sum(text.token_count(i) for i in inputs)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
        self.engine.counters.served += 1
        head = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        return answer({**head, **fields, "usage": usage})


def _strings(body: dict[str, Any], name: str) -> list[str]:
    given = body.get(name)
    strings = [given] if isinstance(given, str) else given
    if not isinstance(strings, list) or not strings or not all(isinstance(s, str) for s in strings):
        raise bad(f"{name} must be a string or a list of strings", name)
    return strings


def _likeness(model: str, one: str, other: str) -> float:
    pairs = zip(text.embed(model, one, DIMENSIONS), text.embed(model, other, DIMENSIONS), strict=True)
    return (1 + sum(a * b for a, b in pairs)) / 2
