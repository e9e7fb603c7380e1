"""Falcon: media, bodies that are streamed in both directions, errors."""

import hashlib
import os

from harness import HERE, Clients, File, pattern, serve, with_both_clients

JSON = [("Content-Type", "application/json")]

server = None


def setUpModule():
    global server
    server = serve("falcon_app:app")


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@with_both_clients
class Falcon(Clients):
    def test_media_is_put_got_and_deleted(self):
        path = "/things/" + self.id()
        self.assertEqual(self.get(path).status, 404)
        put = self.browser.ask("PUT", path, headers=JSON, data=b'{"a": [1, "\xe2\x82\xac"]}')
        self.assertEqual((put.status, put.header("Location")), (201, path))
        got = self.get(path)
        self.assertEqual((got.status, got.json()), (200, {"a": [1, "\u20ac"]}))
        self.assertTrue(got.header("ETag"))
        deleted = self.browser.ask("DELETE", path)
        self.assertEqual((deleted.status, deleted.body), (204, b""))
        self.assertEqual(self.get(path).json()["description"], "There is no %s." % self.id())

    def test_a_body_is_streamed_to_its_end_and_not_beyond(self):
        for size in (0, 1, 65536, 2000000):
            body = pattern(size)
            told = {"sha256": sha256(body), "length": size, "told": size, "beyond": ""}
            self.assertEqual(self.post("/body", data=body, headers=JSON).json(), told)
            chunks = [body[at : at + 50000] for at in range(0, size, 50000)]
            self.assertEqual(self.post("/body", chunks=chunks).json(), told)

    def test_a_body_is_read_by_lines(self):
        lines = ["first\n", "\n", "third\n", "end"]
        answer = self.browser.ask("PUT", "/body", data="".join(lines).encode())
        self.assertEqual(answer.json(), lines)

    def test_a_form_is_read_part_by_part(self):
        data = pattern(1500000)
        files = [File("file", "a b.bin", data), File("text", "t.txt", b"text", "text/plain")]
        answer = self.post("/upload", fields={"title": "x"}, files=files)
        self.assertEqual(answer.status, 200, answer)
        parts = answer.json()
        kind = "application/octet-stream"
        self.assertEqual(parts["file"], ["a b.bin", kind, len(data), sha256(data)])
        self.assertEqual(parts["text"], ["t.txt", "text/plain", 4, sha256(b"text")])
        self.assertEqual(parts["title"][2:], [1, sha256(b"x")])

    def test_answers_are_streamed(self):
        answer = self.get("/streams/generator")
        self.assertEqual(answer.body, b"".join(b"%d\n" % number for number in range(20000)))
        sized = self.get("/streams/sized")
        self.assertEqual((sized.body, sized.header("Content-Length")), (b"1234567890", "10"))
        with open(os.path.join(HERE, "falcon_app.py"), "rb") as file:
            self.assertEqual(self.get("/streams/file").body, file.read())
        self.assertEqual(self.get("/streams/memory").body, b"from memory")
        self.assertEqual(self.browser.ask("HEAD", "/cookies").status, 405)

    def test_cookies_and_fields_that_come_several_times(self):
        answer = self.get("/cookies")
        self.assertEqual(len(answer.values("Set-Cookie")), 2)
        self.assertEqual(", ".join(answer.values("X-Several")), "one, two")
        self.assertEqual(self.get("/cookies").json(), {"first": "1", "second": "a b"})

    def test_what_a_resource_allows(self):
        answer = self.browser.ask("OPTIONS", "/things/x")
        self.assertEqual(answer.status, 200)
        self.assertEqual(set(answer.header("Allow").split(", ")), {"GET", "PUT", "DELETE"})
        self.assertEqual(self.browser.ask("PATCH", "/things/x").status, 405)

    def test_errors_of_every_kind(self):
        teapot = self.get("/failing/teapot")
        self.assertEqual((teapot.status, teapot.reason), (418, "I'm a teapot"))
        self.assertEqual(teapot.json(), {"title": "Short and stout"})
        busy = self.get("/failing/busy")
        self.assertEqual((busy.status, busy.header("Retry-After")), (503, "7"))
        moved = self.get("/failing/moved")
        self.assertEqual((moved.status, moved.header("Location")), (301, "/things/there"))
        own = self.get("/failing/own")
        self.assertEqual(
            (own.status, own.json()["description"]), (422, "handled by the application")
        )
        failed = self.get("/failing/badly")
        self.assertEqual(failed.status, 500)
        self.assert_logged("RuntimeError: this resource fails")
        self.assertEqual(self.post("/things/x", headers=JSON, data=b"{").status, 405)
        broken = self.browser.ask("PUT", "/things/x", headers=JSON, data=b"{")
        self.assertEqual(broken.status, 400)

    def test_where_a_request_was_meant_to_go(self):
        path = "/environ/caf%C3%A9/b?a=1&a=2&c=%26"
        told = self.get(path).json()
        self.assertEqual(told["path"], "/environ/caf\u00e9/b")
        self.assertEqual(told["params"], {"a": ["1", "2"], "c": "&"})
        self.assertEqual((told["host"], told["port"]), (server.host, server.port))
        self.assertEqual((told["scheme"], told["remote"]), ("http", "127.0.0.1"))
        self.assertTrue(told["url"].startswith(server.url + "/environ/"))
        headers = [("X-Forwarded-For", "203.0.113.9"), ("X-Forwarded-Proto", "https")]
        told = self.get(path, headers=headers + [("Host", "example.com")]).json()
        self.assertEqual((told["scheme"], told["remote"]), ("https", "203.0.113.9"))
        self.assertTrue(told["url"].startswith("https://example.com/environ/"))
