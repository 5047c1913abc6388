"""API keys: the file, the commands, the arithmetic of limits, tokens read from answers."""

from __future__ import annotations

import datetime as dt
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from proxy.cli.main import cli
from proxy.errors import ConfigError
from proxy.server.auth import api_keys
from proxy.server.auth.prompt_tokens import AUDIO_TOKENS, FILE_TOKENS, IMAGE_TOKENS, prompt_tokens
from proxy.server.auth.rate_limit import Account, Bucket
from proxy.server.auth.token_meter import Meter

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, ["key", *words])


def made(file: Path, name: str = "team", *options: str) -> str:
    result = run("new", name, "-f", str(file), *options)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


# --- the file and its commands ---


def test_a_new_key_is_found_and_the_file_has_only_its_hash(file: Path) -> None:
    key = made(
        file, "team", "-m", "a", "-m", "b", "--requests-per-minute", "5", "--priority", "high", "--expires", "90d"
    )
    assert key.startswith("wp_")
    assert len(key) == 55
    text = file.read_text()
    assert key not in text
    assert key.rpartition("_")[2] not in text
    found = api_keys.read(file).find(key)
    assert found is not None
    id_, entry = found
    assert id_ == key[3:11]
    assert (entry.name, entry.models, entry.requests_per_minute, entry.priority) == ("team", ["a", "b"], 5, "high")
    assert entry.expires is not None
    assert dt.timedelta(days=89) < entry.expires - dt.datetime.now(dt.UTC) <= dt.timedelta(days=90)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_two_keys_never_share_salt_or_secret(file: Path) -> None:
    first, second = made(file, "a"), made(file, "b")
    entries = list(api_keys.read(file).entries().values())
    assert entries[0].salt != entries[1].salt
    assert first != second


def test_what_is_no_key_is_not_found(file: Path) -> None:
    key = made(file)
    known = api_keys.read(file)
    other = "wp_aaaaaaaa_" + key[12:]
    for wrong in (
        "",
        "wp_",
        key[:-1],
        key + "x",
        key.upper(),
        f" {key}",
        other,
        key[:12] + "A" * 43,
        "sk-" + key,
        "ü" * 55,
    ):
        assert known.find(wrong) is None, wrong
    assert api_keys.Keys({}).find(key) is None


@given(st.text())
def test_no_text_is_a_key_or_an_error(text: str) -> None:
    assert api_keys.Keys({}).find(text) is None
    assert api_keys.Keys({"aaaaaaaa": api_keys.generate("x")[2]}).find(f"wp_aaaaaaaa_{text}") is None


def test_list_shows_everything_but_secrets_and_revoke_takes_one_out(file: Path) -> None:
    key = made(file, "team-a", "--tokens-per-minute", "1000")
    gone = made(file, "team-b")
    listed = run("list", "-f", str(file)).stdout
    assert "team-a" in listed
    assert "1000 tokens/min" in listed
    entry = api_keys.read(file).entries()[key[3:11]]
    assert not any(secret in listed for secret in (key, entry.salt, entry.sha256))
    assert run("revoke", "team-b", "-f", str(file)).exit_code == 0
    assert api_keys.read(file).find(gone) is None
    assert run("revoke", key[3:11], "-f", str(file)).exit_code == 0
    assert api_keys.read(file).entries() == {}
    assert run("revoke", "team-a", "-f", str(file)).exit_code == 2


def test_the_file_is_found_through_the_configuration(file: Path, tmp_path: Path) -> None:
    config = tmp_path / "warmpool.toml"
    config.write_text(f'[server]\nkeys_file = "{file}"\n[models.demo.process]\ncommand = ["x", "{{port}}"]\n')
    assert run("new", "team", "-c", str(config)).exit_code == 0
    assert "team" in run("list", "-c", str(config)).stdout
    assert "say which file" in run("list").output


@pytest.mark.parametrize(
    "options", [["bad name"], ["x", "--concurrency", "0"], ["x", "--expires", "soon"], ["x", "--priority", "top"]]
)
def test_what_new_refuses(file: Path, options: list[str]) -> None:
    result = run("new", *options, "-f", str(file))
    assert result.exit_code == 2
    assert not file.exists()


def test_a_name_is_given_once(file: Path) -> None:
    made(file, "team")
    assert "already" in run("new", "team", "-f", str(file)).output


def test_many_at_once_lose_no_key(file: Path) -> None:
    def add(number: int) -> str:
        with api_keys.changing(file) as entries:
            id_, key, entry = api_keys.generate(f"team-{number}")
            entries[id_] = entry
            return key

    with ThreadPoolExecutor(8) as threads:
        all_keys = list(threads.map(add, range(24)))
    known = api_keys.read(file)
    assert all(known.find(key) is not None for key in all_keys)
    assert [p.name for p in file.parent.iterdir()] == ["keys.toml"]


def test_owner_and_mode_stay_when_the_file_is_written_again(file: Path) -> None:
    made(file, "a")
    file.chmod(0o640)
    made(file, "b")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o660, 0o602])
def test_a_file_that_others_can_read_or_change_is_refused(file: Path, mode: int) -> None:
    made(file)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}"):
        api_keys.read(file)
    assert run("list", "-f", str(file)).exit_code == 78


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_somebody_else_is_refused(file: Path) -> None:
    made(file)
    os.chown(file, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        api_keys.read(file)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("keys = [", "is not TOML"),
        ("[keys.short]\nname='x'", "keys.short"),
        ("[keys.aaaaaaaa]\nname='x'\n", "keys.aaaaaaaa.salt: is required"),
        ("[other]\n", "other: unknown key"),
        ("[pasted-secret]\n", "…: unknown key"),
        ("[keys.pasted-secret]\n", "keys.…"),
        ("[keys.aaaaaaaa]\npasted-secret=1\n", "keys.aaaaaaaa.…: unknown key"),
    ],
)
def test_a_broken_file_says_where_and_never_shows_its_values(file: Path, text: str, problem: str) -> None:
    file.write_text(text + '\n# "pasted-secret"')
    file.chmod(0o600)
    with pytest.raises(ConfigError, match=problem) as failure:
        api_keys.read(file)
    assert "pasted-secret" not in str(failure.value)


def test_a_value_that_is_wrong_is_not_repeated(file: Path) -> None:
    made(file)
    file.write_text(file.read_text().replace('priority = "normal"', 'priority = "pasted-secret"'))
    with pytest.raises(ConfigError, match="priority") as failure:
        api_keys.read(file)
    assert "pasted-secret" not in str(failure.value)


def test_what_is_wrong_with_a_key_is_said_in_our_words(file: Path) -> None:
    made(file)
    text = file.read_text()
    for line, sentence in (
        ('requests_per_minute = "many"', "requests_per_minute: must be a whole number"),
        ("concurrency = 0", "concurrency: must be 1 at least"),
        ('priority = "urgent"', 'priority: must be one of "low", "normal", "high"'),
        ("expires = 2030-01-01T00:00:00", "expires: must be a time with its zone"),
        ('expirs = "x"', "expirs: unknown key"),
    ):
        name = line.partition(" ")[0]
        kept = [had for had in text.splitlines() if not had.startswith(f"{name} ")]
        file.write_text("\n".join([*kept, line, ""]))
        with pytest.raises(ConfigError) as failure:
            api_keys.read(file)
        assert sentence in str(failure.value)
    wrong = run("new", "no good", "-f", str(file.with_name("other.toml")))
    assert "name: must be a name of letters, digits and _.@-" in wrong.output


def test_a_missing_file_says_how_to_make_it(file: Path) -> None:
    with pytest.raises(ConfigError, match="warmpool key new"):
        api_keys.read(file)


def test_the_admin_token(tmp_path: Path) -> None:
    path = tmp_path / "token"
    result = run("admin-token", str(path))
    assert result.exit_code == 0
    first = api_keys.read_token(path)
    assert first.decode() not in result.output
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    refused = run("admin-token", str(path))
    assert (refused.exit_code, api_keys.read_token(path)) == (1, first)
    assert "--yes replaces it" in refused.output
    run("admin-token", str(path), "--yes")
    assert api_keys.read_token(path) != first
    path.write_text("short")
    with pytest.raises(ConfigError, match="32 or more"):
        api_keys.read_token(path)
    path.write_text("x" * 40)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="mode 0644"):
        api_keys.read_token(path)


# --- limits ---


def test_a_bucket_holds_a_minute_and_fills_evenly() -> None:
    bucket = Bucket(60, 0.0)
    bucket.take(60, 0.0)
    assert bucket.seconds_until(1, 0.0) == 1.0
    assert bucket.left(0.5)[0] == 0
    assert bucket.left(10.0)[0] == 10
    assert bucket.left(1000.0) == (60, 0.0)
    bucket.take(120, 1000.0)
    assert bucket.seconds_until(1, 1000.0) == 61.0, "a debt is paid back first"
    assert bucket.left(1000.0) == (0, 120.0)


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 50)), max_size=50), st.integers(1, 1000))
def test_no_window_gets_more_than_two_minutes_worth(steps: list[tuple[float, int]], limit: int) -> None:
    """A full bucket and what flows in: at most limit + limit * t / 60 in any time t."""
    account, now, taken = Account(), 0.0, 0
    account.set_limits(limit, None, None, now)
    for wait_s, tries in steps:
        now += wait_s
        for _ in range(tries):
            if account.begin(now) is None:
                taken += 1
                account.end(0, 0, now)
    assert taken <= limit + limit * now / 60 + 1e-6


def test_an_account_takes_what_was_expected_and_settles() -> None:
    account = Account()
    account.set_limits(None, 100, 2, 0.0)
    assert account.begin(0.0) is None
    account.expect(90, 0.0)
    assert account.headers(0.0)["x-ratelimit-remaining-tokens"] == "10"
    assert account.begin(0.0) is None, "as long as one is left"
    account.expect(50, 0.0)
    refusal = account.begin(0.0)
    assert refusal is not None
    assert refusal.what == "requests at once"
    account.end(90, 10, 0.0)
    refusal = account.begin(0.0)
    assert refusal is None
    account.expect(1, 0.0)
    account.end(1, 0, 0.0)
    account.end(50, 200, 0.0)
    refusal = account.begin(0.0)
    assert refusal is not None
    assert (refusal.what, refusal.limit) == ("tokens per minute", 100)
    assert refusal.retry_after_s == pytest.approx(111 / 100 * 60)
    assert account.running == 0


def test_a_changed_limit_keeps_what_was_used() -> None:
    account = Account()
    account.set_limits(10, None, None, 0.0)
    for _ in range(8):
        account.begin(0.0)
    account.set_limits(20, None, None, 0.0)
    assert account.headers(0.0)["x-ratelimit-remaining-requests"] == "12"
    account.set_limits(None, None, None, 0.0)
    assert account.headers(0.0) == {}


# --- tokens ---

COMPLETION = (
    b'{"id":"x","choices":[{"text":"a \\"usage\\":{\\"total_tokens\\":9999} b"}],'
    b'"usage":{"prompt_tokens":5,"total_tokens":12,"completion_tokens":7,"prompt_tokens_details":null},"more":1}'
)
SPACED = b'{"usage": {"prompt_tokens": 5, "total_tokens": 12, "completion_tokens": 7}, "choices": []}'
STREAM = (
    b'data: {"choices":[{"delta":{"content":"a"}}],"usage":null}\n\n'
    b'data: {"choices":[{"delta":{"content":"b"}}],"usage":null}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":5,"total_tokens":12,"completion_tokens":7}}\n\ndata: [DONE]\n\n'
)
CONTINUOUS = b"".join(
    b'data: {"choices":[],"usage":{"prompt_tokens":5,"total_tokens":%d,"completion_tokens":%d}}\n\n' % (5 + n, n)
    for n in range(8)
)
ANTHROPIC = (
    b'event: message_start\ndata: {"message":{"usage":{"input_tokens":5,"output_tokens":1}}}\n\n'
    b'event: message_delta\ndata: {"usage":{"output_tokens":7}}\n\n'
)
_PIECE = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"type":"text_delta","text":"a"}}\n\n'
)
ANTHROPIC_CUT = (
    b'event: message_start\ndata: {"message":{"usage":{"input_tokens":5,"output_tokens":1}}}\n\n'
    b'event: content_block_start\ndata: {"type":"content_block_start"}\n\nevent: ping\ndata: {"type":"ping"}\n\n'
) + _PIECE * 7
_DELTA = b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"data:"}\n\n'
RESPONSES_CUT = (
    b'event: response.created\ndata: {"response":{"usage":null}}\n\nevent: response.in_progress\ndata: {}\n\n'
    b"event: response.output_item.added\ndata: {}\n\n"
) + _DELTA * 7
RESPONSES = RESPONSES_CUT + (
    b'event: response.completed\ndata: {"response":{"usage":{"input_tokens":3,"input_tokens_details":'
    b'{"cached_tokens":0},"output_tokens":9,"total_tokens":12}}}\n\n'
)
QUOTING = b'data: {"choices":[{"delta":{"content":"data: data:"}}]}\n\n' * 7 + b"data: [DONE]\n\n"
WITHOUT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n' * 7 + b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (COMPLETION, 0), (SPACED, 0), (STREAM, 0), (CONTINUOUS, 0), (ANTHROPIC, 0), (ANTHROPIC_CUT, 0), (RESPONSES, 0),
        (RESPONSES_CUT, 5), (WITHOUT, 5), (QUOTING, 5),
    ],
    ids=[
        "completion", "spaced", "stream", "continuous", "anthropic", "anthropic, cut off", "responses",
        "responses, cut off", "estimated", "quoting",
    ],
)  # fmt: skip
@given(data=st.data())
def test_tokens_are_the_same_however_the_answer_is_cut(body: bytes, expected: int, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=20)))
    meter = Meter(expected)
    for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True):
        meter.feed(body[start:end])
    assert meter.tokens() == 12


def test_what_was_not_answered_costs_nothing_and_what_says_nothing_is_estimated() -> None:
    assert Meter(1000).tokens() == 0
    meter = Meter(10)
    meter.feed(b"x" * 80)
    assert meter.tokens() == 30


PICTURE = "data:image/png;base64," + "A" * 3_000_000
WORDS = "How many people are in it?"


@pytest.mark.parametrize(
    ("request_", "tokens"),
    [
        ({"prompt": "x" * 400}, 100),
        ({"prompt": ["é" * 200, "x" * 400]}, 200),
        ({"prompt": [17, 4, 12]}, 3),
        ({"prompt": [[17, 4], [12]]}, 3),
        ({"messages": [{"role": "user", "content": "x" * 400}]}, 100),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": WORDS},
                            {"type": "image_url", "image_url": {"url": PICTURE, "detail": "high"}},
                            {"image_url": {"url": PICTURE}},
                            {"image_url": "https://example.com/a.png"},
                            {"type": "input_audio", "input_audio": {"data": "A" * 1_000_000, "format": "wav"}},
                            {"type": "file", "file": {"filename": "a.pdf", "file_data": "A" * 1_000_000}},
                        ],
                    }
                ]
            },
            2 * IMAGE_TOKENS + AUDIO_TOKENS + FILE_TOKENS,
        ),
        (
            {
                "instructions": WORDS,
                "input": [
                    {"role": "user", "content": [{"type": "input_image", "image_url": PICTURE}]},
                    {"type": "function_call_output", "output": [{"type": "input_file", "file_data": "A" * 1_000_000}]},
                    {"type": "image_generation_call", "result": "A" * 1_000_000},
                ],
            },
            2 * IMAGE_TOKENS + FILE_TOKENS,
        ),
        (
            {
                "system": [{"type": "text", "text": WORDS}],
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "image",
                                "source": {"type": "base64", "media_type": "image/png", "data": "A" * 1_000_000},
                            },
                            {"type": "document", "source": {"type": "base64", "data": "A" * 1_000_000}},
                            {"type": "document", "source": {"type": "text", "data": "x" * 4000}},
                            {
                                "type": "tool_result",
                                "content": [{"type": "image", "source": {"type": "url", "url": "https://example.com/"}}],
                            },
                        ],
                    }
                ],
            },
            2 * IMAGE_TOKENS + FILE_TOKENS + 1000,
        ),
        ({"prompt_embeds": ["A" * 1_000_000], "prompt": None}, FILE_TOKENS),
        (None, 0),
    ],
    ids=[
        "text", "texts", "tokens", "lists of tokens", "chat", "chat with parts", "responses", "messages", "tensors",
        "nothing",
    ],
)  # fmt: skip
def test_a_request_is_counted_by_the_kind_of_its_parts(request_: object, tokens: int) -> None:
    found = prompt_tokens(request_)
    assert tokens <= found <= tokens * 1.02 + 100


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda v: st.lists(v) | st.dictionaries(st.text() | st.just("type") | st.just("source"), v),
    )
)
def test_whatever_is_asked_has_a_cost(request_: object) -> None:
    assert prompt_tokens(request_) >= 0


def test_a_request_of_very_many_values_is_not_looked_at_for_long() -> None:
    steps = 0

    class Counted(list[object]):
        def __bool__(self) -> bool:
            nonlocal steps
            steps += 1
            return False

    assert prompt_tokens([Counted() for _ in range(200_000)]) == 0
    assert steps < 50_000


def test_a_meter_keeps_little_of_a_large_answer() -> None:
    meter = Meter()
    for _ in range(100):
        meter.feed(b'{"usage":null}' * 1000)
    assert len(meter._tail) <= 1024


def test_what_people_wrote_into_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    for name in ("a", "b"):
        with api_keys.changing(path) as entries:
            id_, _, entry = api_keys.generate(name)
            entries[id_] = entry
    first, second = api_keys.read(path).entries()
    text = path.read_text().replace(f"[keys.{second}]", f"[keys.{second}]\n# the second team, until May")
    path.write_text(text.replace('name = "a"', 'name = "a"   # Anna'))
    with api_keys.changing(path) as entries:
        id_, _, entry = api_keys.generate("c", requests_per_minute=5)
        entries[id_] = entry
    changed = path.read_text()
    assert "# the second team, until May\n" in changed
    assert 'name = "a"   # Anna' in changed
    assert changed.startswith("# Written by `warmpool key`")
    assert [entry.name for entry in api_keys.read(path).entries().values()] == ["a", "b", "c"]
    with api_keys.changing(path) as entries:
        del entries[first]
    assert "Anna" not in path.read_text()
    assert "until May" in path.read_text()
    assert [entry.name for entry in api_keys.read(path).entries().values()] == ["b", "c"]
