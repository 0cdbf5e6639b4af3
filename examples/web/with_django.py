"""Django: ``gunicorn --workers 2 with_django:web``. One file with what a project has in several."""

from __future__ import annotations

from functools import partial
from typing import Any

import shop
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.db import transaction
from django.http import Http404, HttpRequest, JsonResponse
from django.urls import path

import fastq

settings.configure(
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["127.0.0.1"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    MIDDLEWARE=[f"{__name__}.no_redis"],
)


def no_redis(get_response: Any) -> Any:
    """A middleware's view of exceptions: 503 instead of 500."""

    def middleware(request: HttpRequest) -> Any:
        return get_response(request)

    def process_exception(request: HttpRequest, error: Exception) -> JsonResponse | None:
        if isinstance(error, fastq.BrokerUnavailable):
            return JsonResponse({"detail": "try again later"}, status=503)
        return None

    middleware.process_exception = process_exception  # type: ignore[attr-defined]  # how Django finds it
    return middleware


def receipt(request: HttpRequest, order: int) -> JsonResponse:
    jobs: list[fastq.JobHandle[str]] = []
    send = partial(shop.send_receipt.enqueue_sync, order, request.GET["to"])
    with transaction.atomic():
        # the order is stored here
        transaction.on_commit(lambda: jobs.append(send()))  # a worker may run it at once: not before the order is there
    return JsonResponse({"job": jobs[0].id}, status=202)


def show(request: HttpRequest, job_id: str) -> JsonResponse:
    status = shop.app.get_status_sync(job_id)
    if status is None:
        raise Http404
    return JsonResponse(status.to_dict())


urlpatterns = [path("orders/<int:order>/receipt", receipt), path("jobs/<str:job_id>", show)]
web = get_wsgi_application()
