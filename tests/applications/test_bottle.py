"""Bottle: templates, static files, uploads, cookies, errors."""

import hashlib
import os

from harness import HERE, Clients, File, pattern, serve, with_both_clients

server = None


def setUpModule():
    global server
    server = serve("bottle_app:app")


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@with_both_clients
class Bottle(Clients):
    def test_a_template(self):
        answer = self.get("/")
        self.assertEqual(
            answer.text, "<title>caf\u00e9</title>\n<li>&lt;one&gt;</li>\n<li>two</li>\n"
        )
        self.assertEqual(self.get("/hello/caf%C3%A9").text, "hello caf\u00e9")
        self.assertEqual(self.browser.ask("HEAD", "/").status, 200)

    def test_a_static_file_whole_in_part_and_not_again(self):
        with open(os.path.join(HERE, "bottle_app.py"), "rb") as file:
            data = file.read()
        answer = self.get("/static/bottle_app.py")
        self.assertEqual((answer.status, answer.body), (200, data))
        self.assertEqual(answer.header("Accept-Ranges"), "bytes")
        head = self.browser.ask("HEAD", "/static/bottle_app.py")
        self.assertEqual(head.header("Content-Length"), str(len(data)))
        for asked, part in [
            ("0-0", data[:1]),
            ("100-199", data[100:200]),
            ("1000-", data[1000:]),
            ("-50", data[-50:]),
        ]:
            answer = self.get("/static/bottle_app.py", headers=[("Range", "bytes=" + asked)])
            self.assertEqual((answer.status, answer.body), (206, part), asked)
            self.assertEqual(answer.header("Content-Length"), str(len(part)))
        beyond = self.get("/static/bottle_app.py", headers=[("Range", "bytes=999999-")])
        self.assertEqual(beyond.status, 416)
        headers = [("If-Modified-Since", answer.header("Last-Modified"))]
        again = self.get("/static/bottle_app.py", headers=headers)
        self.assertEqual((again.status, again.body), (304, b""))

    def test_a_static_file_that_is_none(self):
        self.assertEqual(self.get("/static/nothing").status, 404)
        for path in ("/static/../secret", "/static/%2e%2e/secret", "/static/%2Fetc/passwd"):
            self.assertIn(self.get(path).status, (403, 404))

    def test_a_download(self):
        answer = self.get("/download")
        self.assertEqual(answer.status, 200)
        self.assertTrue(answer.header("Content-Disposition").startswith("attachment"))

    def test_an_upload(self):
        data = pattern(1000000)
        files = [File("file", "a.bin", data), File("note", "n.txt", b"note", "text/plain")]
        answer = self.post("/upload", fields={"title": "a\u00e9&b=c"}, files=files)
        self.assertEqual(answer.status, 200, answer)
        told = answer.json()
        kind = "application/octet-stream"
        self.assertEqual(told["files"]["file"], ["a.bin", kind, sha256(data)])
        self.assertEqual(told["files"]["note"], ["n.txt", "text/plain", sha256(b"note")])
        self.assertEqual(told["form"], {"title": "a\u00e9&b=c"})

    def test_a_body_with_a_length_and_one_in_chunks(self):
        for size in (1, 70000, 2000000):
            data = pattern(size)
            told = {"sha256": sha256(data), "length": size}
            self.assertEqual(self.post("/body", data=data).json(), told)
            chunks = [data[at : at + 30000] for at in range(0, size, 30000)]
            self.assertEqual(self.post("/body", chunks=chunks).json(), told)
        headers = [("Content-Type", "application/json")]
        answer = self.post("/json", headers=headers, chunks=[b'{"a": ', b"[1, 2]}"])
        self.assertEqual(answer.json(), {"got": {"a": [1, 2]}})

    def test_signed_and_several_cookies(self):
        self.assertEqual([self.get("/visits").text for _ in range(3)], ["1", "2", "3"])
        answer = self.get("/several")
        self.assertEqual((answer.status, answer.reason), (299, "Several"))
        self.assertEqual(sorted(answer.values("Set-Cookie")), ["a=1", "b=2"])
        self.assertEqual(answer.body, b"")

    def test_a_generator_and_something_that_can_be_read(self):
        self.assertEqual(self.get("/words").text, "one \u20ac three")
        with open(os.path.join(HERE, "bottle_app.py"), "rb") as file:
            self.assertEqual(self.get("/read").body, file.read())

    def test_a_redirection(self):
        answer = self.get("/away")
        self.assertEqual(answer.status, 303)
        self.assertEqual(answer.header("Location"), server.url + "/hello/away?a=b")
        self.assertEqual(self.get("/away", follow=True).text, "hello away")

    def test_error_pages(self):
        missing = self.get("/nowhere")
        self.assertEqual((missing.status, missing.text), (404, "nothing at /nowhere"))
        teapot = self.get("/abort/418")
        self.assertEqual((teapot.status, teapot.text), (418, "teapot: aborted, with a reason"))
        self.assertIn("aborted, with a reason", self.get("/abort/503").text)
        self.assertEqual(self.post("/").status, 405)
        for path, said in (
            ("/fail", "this route fails"),
            ("/fail-at-first", "this generator fails"),
        ):
            failed = self.get(path)
            self.assertEqual(failed.status, 500)
            self.assertNotIn(said, failed.text)
        self.assert_logged("RuntimeError: this route fails")
        self.assertEqual(self.get("/hello/again").text, "hello again")
