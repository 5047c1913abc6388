"""llama.cpp's own HTTP server as one program, out of the wheel `xllamacpp`, which has it as a library.

``PYTHON -P loadtest/llama_cpp_server.py --model FILE --port PORT``, with the Python of an environment that has the
wheel. The options are those of `llama-server`, as far as there are any, so that a configuration is right for both.
"""

from __future__ import annotations

import argparse
import signal

import xllamacpp


def main() -> None:
    """Serve until a signal ends it."""
    parser = argparse.ArgumentParser(prog="llama_cpp_server", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("-m", "--model", required=True, help="the model, a GGUF file")
    add("-a", "--alias", default="", help="its name in the API")
    add("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    add("--port", type=int, default=8080, help="the port (default: %(default)s)")
    add(
        "-c",
        "--ctx-size",
        type=int,
        default=2048,
        help="tokens of context of all slots (default: %(default)s)",
    )
    add("-np", "--parallel", type=int, default=2, help="slots: requests at once (default: %(default)s)")
    add("-t", "--threads", type=int, default=1, help="threads that compute (default: %(default)s)")
    add("--metrics", action="store_true", help="answer /metrics")
    options = parser.parse_args()
    # Before the server has threads: they inherit it, and the signal is left to `sigwait`.
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    params = xllamacpp.CommonParams()
    params.model.path = options.model
    if options.alias:
        params.model_alias = {options.alias}
    params.hostnames, params.port = [options.host], options.port
    params.n_ctx, params.n_parallel = options.ctx_size, options.parallel
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.endpoint_metrics = options.metrics
    server = xllamacpp.Server(params)
    print(f"llama.cpp {xllamacpp.BUILD_INFO} listening on {server.listening_address}", flush=True)
    signal.sigwait(signals)


if __name__ == "__main__":
    main()
