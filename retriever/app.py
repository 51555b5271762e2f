"""The HTTP application: `/retrieve`, `/corpora/{name}/retrieve`, `/health`, `/ready`, `/info`, `/metrics`, `/docs`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from retriever import openapi
from retriever.protocol import RequestError
from retriever.responses import error_response, json_response
from retriever.service import Service


def create_app(service: Service) -> FastAPI:
    """An ASGI application around `service`, which it starts and closes.

    Bodies are read by orjson and our own checks rather than by pydantic models, which cost half the throughput
    and answer a wrong value with a page of JSON. The page at `/docs` is written to say the same.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.close()

    app = FastAPI(
        title="dgpo retriever", description="Passage search in Search-R1's protocol.", version="1", lifespan=lifespan
    )

    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> Response:
        return error_response(error)

    guarded: dict[str, Any] = {"openapi_extra": openapi.security(service.needs_token)}
    retrieving: dict[str, Any] = {
        "responses": openapi.retrieve_responses(),
        "response_class": Response,
        "openapi_extra": openapi.request_body(service.limits) | openapi.security(service.needs_token),
    }
    names = {"enum": sorted(service.names)} if service.names else None
    Name = Annotated[str, Path(json_schema_extra=names)]

    @app.post("/retrieve", **retrieving)
    async def retrieve(request: Request) -> Response:
        """Search the default corpus."""
        return await service.answer(request)

    @app.post("/corpora/{name}/retrieve", **retrieving)
    async def retrieve_from(name: Name, request: Request) -> Response:
        """Search one corpus by its name."""
        return await service.answer(request, name)

    @app.get("/health", responses=openapi.health_responses())
    async def health() -> Response:
        """Liveness: answers as soon as the port is bound, and needs no token."""
        return json_response(200, {"status": "ok"})

    @app.get("/ready", responses=openapi.ready_responses())
    async def ready() -> Response:
        """Whether searches are answered; needs no token."""
        return service.ready_response()

    @app.get("/info", responses=openapi.info_responses(), **guarded)
    async def info(request: Request) -> Response:
        """What is served: encoder, index, corpus hash and count of each corpus, and the limits."""
        service.check_token(request)
        return json_response(200, service.describe())

    @app.get("/metrics", responses=openapi.metrics_responses(), response_class=Response, **guarded)
    async def metrics(request: Request) -> Response:
        """Counters for Prometheus."""
        service.check_token(request)
        return Response(service.render_metrics(), media_type=CONTENT_TYPE_LATEST)

    if service.needs_token:
        openapi.add_security_scheme(app.openapi())
    return app
