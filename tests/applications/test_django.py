"""Django: a project as startproject makes it, with the admin, an ORM on sqlite, forms and files.

Served twice: with DEBUG and the handler that also runserver finds static files with; and as in
production, where whitenoise does.
"""

import concurrent.futures
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

from harness import HERE, Clients, File, pattern, serve, with_both_clients

# Behind what startproject writes.
SETTINGS = """
INSTALLED_APPS += ["django_shop"]
DATABASES["default"]["OPTIONS"] = {"timeout": 30, "transaction_mode": "IMMEDIATE"}
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]  # It need not be slow here.
MEDIA_ROOT = BASE_DIR / "media"
STATIC_ROOT = BASE_DIR / "static"
"""
PRODUCTION = """
from .settings import *

DEBUG = False
ALLOWED_HOSTS = ["127.0.0.1", "example.com"]
MIDDLEWARE.insert(1, "whitenoise.middleware.WhiteNoiseMiddleware")
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {"BACKEND": "whitenoise.storage.CompressedManifestStaticFilesStorage"},
}
"""
URLS = """
from django.urls import include

urlpatterns.append(path("", include("django_shop.urls")))
"""
STATIC_WSGI = """
from django.contrib.staticfiles.handlers import StaticFilesHandler
from mysite.wsgi import application

application = StaticFilesHandler(application)
"""
PREPARE = """
import os, django
from django.core.management import call_command

django.setup()
call_command("makemigrations", "django_shop", verbosity=0)
call_command("migrate", verbosity=0)
call_command("collectstatic", verbosity=0, interactive=False)
from django.contrib.auth.models import User

User.objects.create_superuser("admin", "admin@example.com", "secret")
"""

server = production = None


def setUpModule():
    global server, production
    project = tempfile.mkdtemp(prefix="django-")
    unittest.addModuleCleanup(shutil.rmtree, project)
    run(project, "-m", "django", "startproject", "mysite", project)
    shutil.copytree(
        os.path.join(HERE, "django_shop"),
        os.path.join(project, "django_shop"),
        ignore=shutil.ignore_patterns("__pycache__", "migrations"),
    )
    append(project, "mysite/settings.py", SETTINGS)
    append(project, "mysite/production.py", PRODUCTION)
    append(project, "mysite/urls.py", URLS)
    append(project, "static_wsgi.py", STATIC_WSGI)
    run(project, "-c", PREPARE, DJANGO_SETTINGS_MODULE="mysite.production")
    server = serve("static_wsgi:application", chdir=project)
    production = serve(
        "mysite.wsgi:application",
        chdir=project,
        env={"DJANGO_SETTINGS_MODULE": "mysite.production"},
    )


def run(project, *args, **env):
    done = subprocess.run(
        [sys.executable, "-B", *args],
        cwd=project,
        env=dict(os.environ, **env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout.decode("utf-8", "replace")


def append(project, name, text):
    with open(os.path.join(project, name), "a") as file:
        file.write(text)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


class Browsing(Clients):
    def token(self, path, **keywords):
        """The CSRF token of the form at this path; its other half is now a cookie."""
        answer = self.get(path, **keywords)
        self.assertEqual(answer.status, 200, answer)
        return re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', answer.text)[1]

    def log_in(self):
        token = self.token("/admin/login/?next=/admin/")
        fields = {"username": "admin", "password": "secret", "next": "/admin/"}
        fields["csrfmiddlewaretoken"] = token
        answer = self.post("/admin/login/?next=/admin/", fields=fields)
        self.assertEqual((answer.status, answer.header("Location")), (302, "/admin/"), answer)


@with_both_clients
class Django(Browsing):
    def test_a_page(self):
        answer = self.get("/")
        self.assertEqual((answer.status, answer.text), (200, "<title>caf\u00e9</title>"))
        self.assertEqual(answer.header("X-Frame-Options"), "DENY")
        head = self.browser.ask("HEAD", "/")
        self.assertEqual(head.header("Content-Length"), str(len(answer.body)))
        self.assertEqual(self.get("/hello/caf%C3%A9%2Fb/").status, 404)
        self.assertEqual(self.get("/hello/caf%C3%A9/").text, "hello caf\u00e9")

    def test_a_path_without_its_slash_is_redirected(self):
        answer = self.get("/hello/x?a=b")
        self.assertEqual((answer.status, answer.header("Location")), (301, "/hello/x/?a=b"))

    def test_the_admin_wants_a_login_and_logs_out(self):
        answer = self.get("/admin/")
        self.assertEqual(answer.status, 302)
        self.assertEqual(answer.header("Location"), "/admin/login/?next=/admin/")
        wrong = {"username": "admin", "password": "wrong"}
        wrong["csrfmiddlewaretoken"] = self.token("/admin/login/")
        self.assertIn(
            "Please enter the correct username", self.post("/admin/login/", fields=wrong).text
        )
        self.log_in()
        answer = self.get("/admin/")
        self.assertIn("Site administration", answer.text)
        token = self.token("/admin/")
        self.assertEqual(
            self.post("/admin/logout/", fields={"csrfmiddlewaretoken": token}).status, 200
        )
        self.assertEqual(self.get("/admin/").status, 302)

    def test_the_admin_has_its_static_files(self):
        page = self.get("/admin/login/").text
        files = re.findall(r'(?:href|src)="(/static/admin/[^"]+)"', page)
        self.assertGreaterEqual(len(files), 5)
        for path in files:
            answer = self.get(path)
            self.assertEqual(answer.status, 200, path)
            kind = "text/css" if path.endswith(".css") else "text/javascript"
            self.assertTrue(answer.header("Content-Type").startswith(kind), answer.headers)
            self.assertEqual(len(answer.body), int(answer.header("Content-Length")))
            headers = [("If-Modified-Since", answer.header("Last-Modified"))]
            self.assertEqual(self.get(path, headers=headers).status, 304)
        self.assertEqual(self.get("/static/admin/nothing.css").status, 404)

    def test_the_admin_makes_shows_changes_and_deletes_what_the_orm_keeps(self):
        self.log_in()
        title = "made by " + self.client.__name__
        fields = {"title": title, "text": "a\r\nb & c\u20ac", "_save": "Save"}
        fields["csrfmiddlewaretoken"] = self.token("/admin/django_shop/note/add/")
        files = [File("attachment", "a.txt", b"attached", "text/plain")]
        answer = self.post("/admin/django_shop/note/add/", fields=fields, files=files)
        self.assertEqual(
            (answer.status, answer.header("Location")), (302, "/admin/django_shop/note/")
        )
        listed = self.get("/admin/django_shop/note/?q=" + self.client.__name__)
        self.assertIn(title, listed.text)
        self.assertIn("was added successfully", listed.text)
        path = re.search(r'href="(/admin/django_shop/note/\d+/change/)', listed.text)[1]
        self.assertIn("b &amp; c\u20ac", self.get(path).text)
        delete = path.replace("change", "delete")
        token = self.token(delete)
        answer = self.post(delete, fields={"csrfmiddlewaretoken": token, "post": "yes"})
        self.assertEqual(answer.status, 302)
        self.assertEqual(
            self.get("/notes/?title=" + title.replace(" ", "%20")).json(), {"notes": []}
        )

    def test_a_form_without_its_token_is_refused(self):
        for fields in ({"title": "forged"}, {"title": "forged", "csrfmiddlewaretoken": "x" * 64}):
            self.token("/notes/?form")
            answer = self.post("/notes/", fields=fields)
            self.assertEqual(answer.status, 403)
            self.assertIn("CSRF verification failed", answer.text)
        # The body that nobody read is not taken for the next request.
        large = [File("large", "l.bin", pattern(3000000))]
        self.assertEqual(self.post("/upload/", files=large).status, 403)
        self.assertEqual(self.get("/").status, 200)

    def test_many_clients_write_to_the_database_at_once(self):
        def write(number):
            client = self.new_client()
            answer = client.ask("GET", "/notes/?form")
            token = re.search(r'value="(\w+)"', answer.text)[1]
            fields = {"title": "%s %d" % (self.id(), number), "text": "\u20ac" * number}
            fields["csrfmiddlewaretoken"] = token
            return client.ask("POST", "/notes/", fields=fields).status

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            self.assertEqual(list(pool.map(write, range(8))), 8 * [201])
        kept = self.get("/notes/?title=" + self.id()).json()["notes"]
        self.assertEqual(sorted(len(note["text"]) for note in kept), list(range(8)))

    def test_an_upload_in_memory_and_one_too_large_for_it(self):
        for size, kind in [(2000, "InMemoryUploadedFile"), (4000000, "TemporaryUploadedFile")]:
            data = pattern(size)
            fields = {"csrfmiddlewaretoken": self.token("/upload/"), "title": "\u00e9"}
            answer = self.post("/upload/", fields=fields, files=[File("file", "f.bin", data)])
            self.assertEqual(answer.status, 200, answer)
            told = answer.json()
            self.assertEqual(told["form"]["title"], "\u00e9")
            self.assertEqual(told["files"], {"file": [kind, "f.bin", size, sha256(data)]})

    def test_a_body_with_a_length_and_one_in_chunks(self):
        for size in (1, 70000, 3000000):
            data = pattern(size)
            told = {"sha256": sha256(data), "length": size}
            self.assertEqual(self.post("/body/", data=data).json(), told)
            chunks = [data[at : at + 50000] for at in range(0, size, 50000)]
            self.assertEqual(self.post("/body/", chunks=chunks).json(), told)

    def test_a_stream(self):
        for lines in (0, 3, 50000):
            answer = self.get("/stream/?lines=%d" % lines)
            self.assertEqual(answer.text, "".join("line %d\n" % at for at in range(lines)))

    def test_a_file_and_something_like_a_file(self):
        with open(os.path.join(HERE, "django_shop", "views.py"), "rb") as file:
            data = file.read()
        answer = self.get("/download/")
        self.assertEqual((answer.status, answer.body), (200, data))
        self.assertEqual(answer.header("Content-Length"), str(len(data)))
        self.assertIn("filename*=utf-8''caf%C3%A9.py", answer.header("Content-Disposition"))
        self.assertEqual(
            self.browser.ask("HEAD", "/download/").header("Content-Length"), str(len(data))
        )
        self.assertEqual(self.get("/download-memory/").body, b"from memory" * 10000)

    def test_a_session_in_the_database(self):
        self.assertEqual([self.get("/visits/").text for _ in range(3)], ["1", "2", "3"])
        self.assertEqual(self.new_client().ask("GET", "/visits/").text, "1")

    def test_a_connection_serves_one_request_after_the_other(self):
        answers = self.browser.in_a_row("/where/", 4)
        self.assertEqual(answers, 4 * answers[:1])

    def test_the_debug_page_shows_what_failed(self):
        failed = self.get("/fail/")
        self.assertEqual(failed.status, 500)
        self.assertIn("RuntimeError", failed.text)
        self.assertIn("wsgi.file_wrapper", failed.text)
        self.assertIn("Page not found", self.get("/nowhere/").text)


@with_both_clients
class Production(Browsing):
    @classmethod
    def server(cls):
        return production

    def test_static_files_are_named_by_their_content_and_compressed(self):
        page = self.get("/admin/login/").text
        path = re.search(r'href="(/static/admin/css/base\.[0-9a-f]{12}\.css)"', page)[1]
        plain = self.get(path, headers=[("Accept-Encoding", "identity")])
        self.assertEqual((plain.status, plain.header("Content-Encoding")), (200, None))
        self.assertIn("immutable", plain.header("Cache-Control"))
        packed = self.get(path, headers=[("Accept-Encoding", "gzip")])
        self.assertEqual((packed.status, packed.header("Content-Encoding")), (200, "gzip"))
        self.assertLess(int(packed.header("Content-Length")), len(plain.body))
        part = self.get(path, headers=[("Range", "bytes=5-14"), ("Accept-Encoding", "identity")])
        self.assertEqual((part.status, part.body), (206, plain.body[5:15]))
        again = self.get(path, headers=[("If-Modified-Since", plain.header("Last-Modified"))])
        self.assertEqual((again.status, again.body), (304, b""))
        self.assertEqual(self.get("/static/admin/css/base.000000000000.css").status, 404)

    def test_the_admin_is_logged_into(self):
        self.log_in()
        self.assertIn("Site administration", self.get("/admin/").text)

    def test_errors_say_nothing_of_the_inside(self):
        failed = self.get("/fail/")
        self.assertEqual(failed.status, 500)
        self.assertNotIn("RuntimeError", failed.text)
        self.assertEqual(self.get("/nowhere/").status, 404)
        self.assertEqual(self.get("/", headers=[("Host", "evil.example")]).status, 400)

    def test_a_request_through_a_proxy_is_what_its_client_sent(self):
        headers = [("Host", "example.com"), ("X-Forwarded-Proto", "https")]
        headers.append(("X-Forwarded-For", "203.0.113.9"))
        told = self.get("/where/?a=%20b", headers=headers).json()
        self.assertEqual(told["uri"], "https://example.com/where/?a=%20b")
        self.assertEqual((told["secure"], told["remote"]), (True, "203.0.113.9"))
