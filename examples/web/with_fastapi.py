"""FastAPI: ``uvicorn with_fastapi:web``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import shop
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse

import fastq


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    yield
    await shop.app.aclose()


web = FastAPI(lifespan=lifespan)


@web.exception_handler(fastq.BrokerUnavailable)
async def no_redis(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": "try again later"}, 503)


@web.post("/orders/{order}/receipt", status_code=202)
async def receipt(order: int, to: str) -> dict[str, str]:
    job = await shop.send_receipt.enqueue(order, to)
    return {"job": job.id}


@web.get("/jobs/{job_id}")
async def show(job_id: str) -> dict[str, Any]:
    status = await shop.app.get_status(job_id)
    if status is None:
        raise HTTPException(404)
    return status.to_dict()
