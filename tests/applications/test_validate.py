"""wsgiref.validate between uringd and an application: neither may have anything to complain of."""

import unittest

from harness import Wire, pattern, serve

server = None


def setUpModule():
    global server
    server = serve("validated_app:app")


class Validated(unittest.TestCase):
    def setUp(self):
        self.wire = Wire(server)
        self.addCleanup(self.wire.close)
        self.log_begins = len(server.text)

    def ask(self, target, method="GET", **keywords):
        answer = self.wire.ask(target, method, **keywords)
        self.assertTrue(answer.whole)
        return answer

    def tearDown(self):
        # Iterators that were not closed are told when they are collected, at the latest now.
        self.assertEqual(self.ask("/collect").status, 200)
        said = server.text[self.log_begins :]
        self.assertNotIn("AssertionError", said)
        self.assertNotIn("without being closed", said)
        self.assertNotIn("Warning", said)

    def test_methods_and_targets_of_every_kind(self):
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
            for target in ("/", "/?a=b", "/caf%C3%A9/%2F%25?c=%zz", "http://example.com/a"):
                self.assertEqual(self.ask(target, method).status, 200, (method, target))
        self.assertEqual(self.ask("*", "OPTIONS").status, 200)

    def test_bodies_read_by_every_method(self):
        for body in (b"", b"one", b"one\ntwo\nthree", b"line\n" + pattern(300000)):
            for act in ("/read", "/readline", "/readlines", "/iterate"):
                self.assertTrue(self.ask(act, "POST", body=body).body == body, act)
                answer = self.ask(act, "POST", chunks=[body[:5], body[5:]])
                self.assertTrue(answer.body == body, act)

    def test_answers_of_every_kind(self):
        self.assertEqual(self.ask("/read?stream", "POST", body=b"one").body, b"oneend")
        self.assertEqual(self.ask("/read?stream", "HEAD").status, 200)
        self.assertEqual(self.ask("/write").body, b"written, twice, returned")
        self.assertEqual(self.ask("/write", "HEAD").body, b"")
        self.assertEqual(self.ask("/no-content").status, 204)
        self.assertEqual(self.ask("/errors").status, 200)
        self.assertIn(b"wsgiref.validate", self.ask("/file").body)

    def test_an_http_1_0_client(self):
        self.assertEqual(self.ask("/?stream", version="1.0").body, b"end")
        self.wire.close()
        self.wire = Wire(server)
        self.addCleanup(self.wire.close)

    def test_an_application_that_fails(self):
        self.assertEqual(self.ask("/fail").status, 500)
        server.wait_for_log("ValueError: the application's own", self.log_begins)
