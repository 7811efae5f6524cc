"""Long work is a bar on a terminal and plain lines in a log file."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

from dspark_megatron.progress import describe_seconds
from support.paths import ROOT

WORK = """
from dspark_megatron.progress import Progress, say
with Progress(3, "chats.jsonl", "prompts", show={show}) as progress:
    for _ in range(3):
        progress.update()
        say("above")
"""


def run(*, show=True, **environment):
    return dict(
        args=[sys.executable, "-c", WORK.format(show=show)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def in_a_log_file(**kwargs):
    both = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True)
    return subprocess.run(**run(**kwargs), **both).stdout.decode()


def on_a_terminal(**kwargs):
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(**run(**kwargs), stdout=other, stderr=other)
    os.close(other)
    found = b""
    while True:
        try:
            more = os.read(main, 4096)
        except OSError:  # Linux's end of a terminal
            more = b""
        if not more:
            break
        found += more
    os.close(main)
    assert process.wait() == 0
    return found.decode().replace("\r\n", "\n")


def test_a_log_file_has_plain_lines():
    text = in_a_log_file()
    assert "\r" not in text and "\x1b" not in text
    assert text.splitlines() == ["above"] * 3 + ["chats.jsonl: 3/3 prompts in 0 s"]
    assert in_a_log_file(show=False).splitlines() == ["above"] * 3


def test_a_terminal_has_a_bar_where_all_ranks_are_on_one_node():
    bar = on_a_terminal(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    assert "\r" in bar and "chats.jsonl: 100%" in bar
    text = on_a_terminal(WORLD_SIZE="4", LOCAL_WORLD_SIZE="2")
    assert "\r" not in text and "chats.jsonl: 3/3 prompts" in text


def test_seconds_are_told_in_a_unit_that_is_easy_to_read():
    told = [describe_seconds(x) for x in (12.4, 99, 600, 9 * 3600, 86_400 * 3)]
    assert told == ["12 s", "99 s", "10 min", "9 h", "3 days"]
