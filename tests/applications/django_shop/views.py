import hashlib
import io

from django.db import transaction
from django.http import FileResponse, HttpResponse, JsonResponse, StreamingHttpResponse
from django.middleware.csrf import get_token
from django.views.decorators.csrf import csrf_exempt

from .models import Note


def page(request):
    return HttpResponse("<title>caf\u00e9</title>")


def hello(request, name):
    return HttpResponse("hello " + name)


def form(request):
    """A form without fields, for its token."""
    token = get_token(request)
    return HttpResponse('<input name="csrfmiddlewaretoken" value="%s">' % token)


def notes(request):
    if request.method == "GET" and "form" in request.GET:
        return form(request)
    if request.method == "POST":
        with transaction.atomic():
            note = Note.objects.create(title=request.POST["title"], text=request.POST["text"])
        return JsonResponse({"id": note.pk}, status=201)
    found = Note.objects.filter(title__startswith=request.GET.get("title", "")).order_by("pk")
    return JsonResponse({"notes": list(found.values("title", "text"))})


def upload(request):
    if request.method == "GET":
        return form(request)
    told = {}
    for field, file in request.FILES.items():
        digest = hashlib.sha256()
        for piece in file.chunks():
            digest.update(piece)
        told[field] = [type(file).__name__, file.name, file.size, digest.hexdigest()]
    return JsonResponse({"files": told, "form": request.POST.dict()})


def stream(request):
    lines = ("line %d\n" % number for number in range(int(request.GET["lines"])))
    return StreamingHttpResponse(lines, content_type="text/plain")


def download(request):
    return FileResponse(open(__file__, "rb"), as_attachment=True, filename="caf\u00e9.py")


def download_memory(request):
    return FileResponse(io.BytesIO(b"from memory" * 10000), filename="memory.txt")


def visits(request):
    request.session["visits"] = request.session.get("visits", 0) + 1
    return HttpResponse(str(request.session["visits"]))


def where(request):
    return JsonResponse(
        {
            "uri": request.build_absolute_uri(),
            "host": request.get_host(),
            "secure": request.is_secure(),
            "remote": request.META["REMOTE_ADDR"],
            "port": request.META["REMOTE_PORT"],
        }
    )


@csrf_exempt
def body(request):
    """The body as a stream, which Django itself bounds by CONTENT_LENGTH."""
    digest, length = hashlib.sha256(), 0
    while True:
        piece = request.read(10000)
        if not piece:
            return JsonResponse({"sha256": digest.hexdigest(), "length": length})
        digest.update(piece)
        length += len(piece)


def fail(request):
    raise RuntimeError("this view fails")
