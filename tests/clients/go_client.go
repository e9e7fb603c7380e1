// Go's net/http against builtin:echo: go_client PORT. One line a behaviour: its name, then `ok` or why not.
// `echo` has 4 MiB as its limit for bodies (see scripts/clients).

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"
)

const mib = 1 << 20

type echo struct {
	Body, Path, Remote string
}

// patient reads slowly, as a client at the end of a thin line.
type patient struct {
	from io.Reader
}

func (p patient) Read(into []byte) (int, error) {
	time.Sleep(5 * time.Millisecond)
	return p.from.Read(into)
}

type client struct {
	url  string
	http http.Client
}

func (c *client) ask(request *http.Request) (int, echo, error) {
	answer, err := c.http.Do(request)
	if err != nil {
		return 0, echo{}, err
	}
	defer answer.Body.Close()
	var said echo
	if answer.StatusCode == 200 {
		err = json.NewDecoder(answer.Body).Decode(&said)
	}
	// Only a body that was read to its end gives its connection back.
	io.Copy(io.Discard, answer.Body)
	return answer.StatusCode, said, err
}

func (c *client) request(method string, body io.Reader) *http.Request {
	request, err := http.NewRequest(method, c.url, body)
	if err != nil {
		panic(err)
	}
	return request
}

func (c *client) keepAlive() error {
	remotes := map[string]bool{}
	for n := 0; n < 5; n++ {
		_, said, err := c.ask(c.request("GET", nil))
		if err != nil {
			return err
		}
		remotes[said.Remote] = true
	}
	if len(remotes) != 1 {
		return fmt.Errorf("%d connections: %v", len(remotes), remotes)
	}
	return nil
}

func whole() string {
	return strings.Repeat("0123456789abcde\n", 40_000)
}

func (c *client) echoed(request *http.Request) error {
	status, said, err := c.ask(request)
	if err == nil && (status != 200 || said.Body != whole()) {
		err = fmt.Errorf("status %d, %d bytes", status, len(said.Body))
	}
	return err
}

func (c *client) chunked() error {
	// A reader that does not tell its length is sent in chunks.
	request := c.request("POST", io.MultiReader(strings.NewReader(whole())))
	request.Trailer = http.Header{"X-Trailer": {"v"}}
	return c.echoed(request)
}

func (c *client) expect() error {
	request := c.request("POST", strings.NewReader(whole()))
	request.Header.Set("Expect", "100-continue")
	begun := time.Now()
	err := c.echoed(request)
	if err == nil && time.Since(begun) >= c.http.Transport.(*http.Transport).ExpectContinueTimeout {
		err = fmt.Errorf("no 100 Continue came")
	}
	return err
}

// early: refused for its size while it is being sent. Go may see that before or after the answer, and another request
// must find a connection of its own.
func (c *client) early() error {
	for _, wait := range []string{"", "100-continue"} {
		request := c.request("POST", bytes.NewReader(make([]byte, 20*mib)))
		if wait != "" {
			request.Header.Set("Expect", wait)
		}
		status, _, err := c.ask(request)
		if err != nil || status != 413 {
			return fmt.Errorf("status %d, %v", status, err)
		}
	}
	status, _, err := c.ask(c.request("GET", nil))
	if err == nil && status != 200 {
		err = fmt.Errorf("the next request: %d", status)
	}
	return err
}

func (c *client) slowRead() error {
	answer, err := c.http.Post(c.url, "text/plain", strings.NewReader(strings.Repeat("x", 3*mib)))
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	length, err := io.Copy(io.Discard, patient{answer.Body})
	if err == nil && (length != answer.ContentLength || length < 3*mib) {
		err = fmt.Errorf("%d bytes of %d", length, answer.ContentLength)
	}
	return err
}

func main() {
	transport := &http.Transport{MaxConnsPerHost: 1, ExpectContinueTimeout: 20 * time.Second}
	c := &client{"http://127.0.0.1:" + os.Args[len(os.Args)-1] + "/", http.Client{Transport: transport, Timeout: time.Minute}}
	behaviours := []struct {
		name   string
		behave func() error
	}{
		{"keep_alive", c.keepAlive}, {"chunked", c.chunked}, {"expect", c.expect}, {"early", c.early}, {"slow_read", c.slowRead},
	}
	for _, behaviour := range behaviours {
		result := "ok"
		if err := behaviour.behave(); err != nil {
			result = strings.ReplaceAll(err.Error(), "\n", " ")
		}
		fmt.Println(behaviour.name, result)
	}
}
