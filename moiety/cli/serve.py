"""`moiety serve`: a model behind OpenAI's protocol."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from moiety.cli import judged, judged_server
from moiety.cli.output import command, talk
from moiety.cli.own import import_own_routers
from moiety.cli.torch_settings import ONEDNN_CACHE, TORCH_CACHE, keep_few_shapes
from moiety.infer.options import EngineOptions, StreamOptions
from moiety.packages import need
from moiety.serve.options import KEY, ServeOptions

if TYPE_CHECKING:
    from moiety.serve.answers import Served

__all__ = ["app"]

app = command("moiety serve", "Serve a model over HTTP, as clients of OpenAI expect it.")


@app.default
def serve(
    path: str,
    /,
    *,
    server: Annotated[ServeOptions, Parameter(name="*")] = ServeOptions(),
    api_key: Annotated[
        str, Parameter(help=f"what clients must send; better given as {KEY}, which nobody else can see")
    ] = "",
    backend: Annotated[str, Parameter(help="who multiplies the experts")] = "auto",
    experts_per_token: Annotated[int, Parameter(help="use this many; 0 is the model's own number")] = 0,
    engine: Annotated[EngineOptions, Parameter(name="*")] = EngineOptions(),
    stream: Annotated[StreamOptions, Parameter(name="*")] = StreamOptions(),
    plan: Annotated[
        bool, Parameter(negative="", help="say what is planned, and at the end what was measured")
    ] = False,
    router: Annotated[str, Parameter(help="import this module:Class, which the model's config names")] = "",
    adapter: Annotated[tuple[str, ...], Parameter(help="name=folder, asked for as model:name")] = (),
) -> int:
    """Listen until Ctrl-C or SIGTERM; docs/serving.md has the routes and limits.

    Under torchrun the processes share the experts of a plain model among them, and the first one listens.

    Parameters
    ----------
    path
        A checkpoint or run folder, a .gguf file, or owner/name on the hub.
    """
    keep_few_shapes(TORCH_CACHE, ONEDNN_CACHE)
    judged.begin(plan)
    beside_bytes = _load_server(plan)
    from moiety.cli import version
    from moiety.infer.open import open_model
    from moiety.serve.server import Server, check_reach, handle_signals, served_of, settle

    key = api_key or os.environ.get(KEY, "")
    check_reach(server.host, key)
    import_own_routers(router)
    loading: dict[str, Any] = {"stream": stream, "engine": engine, "experts_per_token": experts_per_token}
    loading |= {"adapters": adapter, "backend": backend}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        unable = {"plan": plan, "memory": stream.memory, "replicas": server.replicas > 1}
        return _run_split(unable, path, loading, server, key)
    threads = 0 if server.replicas == 1 else _divided(server.replicas, plan=plan, memory=stream.memory)
    opened = open_model(path, say=talk().print, **loading)
    served = served_of(opened, engine, server)
    if threads:
        return _run_replicas(served, threads, key)
    running = Server(served, key=key, version=version())
    if plan:
        judged_server.say_plan(opened, served.engine, beside_bytes)
    handle_signals()
    settle()
    running.run(lambda: _say_ready(served, running.port))
    talk().print("stopped")
    if plan:
        judged_server.judge_server(opened, served.engine, beside_bytes)
    return 0


def _say_ready(served: Served, port: int, more: str = "") -> None:
    talk().print(f"serving {served.name} at http://{served.options.host}:{port}/v1{more} (Ctrl-C ends)")


def _divided(replicas: int, *, plan: bool, memory: str) -> int:
    from moiety.serve.replicas import divide_threads

    return divide_threads(replicas, plan=plan, memory=memory)


def _run_replicas(served: Served, threads: int, key: str) -> int:
    from moiety.cli import version
    from moiety.serve.replicas import run_replicas
    from moiety.serve.server import settle

    def ready(port: int) -> None:
        _say_ready(served, port, f", {served.options.replicas} replicas with {threads} threads each")

    settle()
    run_replicas(served, threads=threads, key=key, version=version(), ready=ready)
    talk().print("stopped")
    return 0


def _run_split(
    unable: dict[str, object], path: str, loading: dict[str, Any], options: ServeOptions, key: str
) -> int:
    """Serve a model whose experts are on several processes, of which this is one."""
    from moiety.cli import version
    from moiety.infer.follow import Leader, follow
    from moiety.infer.open import open_model
    from moiety.parallel.share import in_turn, joined
    from moiety.serve.server import Server, handle_signals, served_of, settle

    with joined(unable, options.rank_timeout) as world:
        say = talk(quiet=not world.leads).print
        opened = in_turn(world, lambda: open_model(path, say=say, **loading), lambda one: one.model)
        served = served_of(opened, loading["engine"], options)
        settle()
        if world.leads:
            running = Server(served, key=key, version=version())
            handle_signals()
            more = f", experts on {world.ranks} processes"
            with Leader(world, served.engine.runner, running.stop).leading():
                running.run(lambda: _say_ready(served, running.port, more))
        else:
            follow(served.engine.runner)
    say("stopped")
    return 0


def _load_server(plan: bool) -> int:
    """Import what serves; for a plan, the bytes that this took beside what runs models.

    Raises:
        DependencyError: some of it is not installed.
    """
    from moiety.infer.streaming import process_bytes

    before_bytes = process_bytes() if plan else 0
    need("moiety.serve.server", "serving", "moiety[serve]")
    return process_bytes() - before_bytes if plan else 0
