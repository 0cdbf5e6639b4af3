"""Flask: ``gunicorn --preload --workers 2 --threads 4 with_flask:web``."""

from __future__ import annotations

from typing import Any

import shop
from flask import Flask, abort, request

import fastq

web = Flask(__name__)


@web.errorhandler(fastq.BrokerUnavailable)
def no_redis(error: Exception) -> tuple[dict[str, str], int]:
    return {"detail": "try again later"}, 503


@web.post("/orders/<int:order>/receipt")
def receipt(order: int) -> tuple[dict[str, str], int]:
    job = shop.send_receipt.enqueue_sync(order, request.args["to"])
    return {"job": job.id}, 202


@web.get("/jobs/<job_id>")
def show(job_id: str) -> dict[str, Any]:
    status = shop.app.get_status_sync(job_id)
    if status is None:
        abort(404)
    return status.to_dict()
