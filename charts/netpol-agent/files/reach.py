"""`helm test`: does a NetworkPolicy decide who reaches a pod? Standard library only; runs in the agent's image.

    reach.py serve      the server: port 8080 says that it is here, port 8081 the addresses of this pod ($ADDRESSES)
    reach.py allowed    a client that the policy lets in: 8080 must answer
    reach.py denied     one that it does not: 8080 must stay silent, while 8081, which is open to all, answers

A client asks the Service, whose address its environment has ($SERVICE; no DNS is needed), for the server's addresses,
then tries each of them: IPv4 and IPv6, where pods have both.
"""

import os
import socket
import sys
import threading
import time

JUDGED, OPEN = 8080, 8081
PATIENCE = float(os.environ.get("PATIENCE", "60"))
"""Seconds that a client waits for what must come to work."""
SILENCE = float(os.environ.get("SILENCE", "5"))
"""Seconds for which what is denied must stay so."""
TRY = 1.0


def serve() -> None:
    addresses = os.environ["ADDRESSES"]
    for host in addresses.split(","):
        for port, text in ((JUDGED, "here\n"), (OPEN, addresses + "\n")):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            threading.Thread(target=answer, args=(socket.create_server((host, port), family=family), text)).start()
    print(f"serving on {addresses}", flush=True)


def answer(listener: socket.socket, text: str) -> None:
    while True:
        try:
            with listener.accept()[0] as client:
                client.sendall(text.encode())
        except OSError:  # that client went away
            pass


def ask(host: str, port: int) -> str:
    """What it says. Raises OSError; TimeoutError where packets are dropped."""
    with socket.create_connection((host, port), timeout=TRY) as server:
        return server.makefile().readline().strip()


def until_it_answers(host: str, port: int, patience: float) -> str:
    deadline = time.monotonic() + patience
    while True:
        try:
            if said := ask(host, port):
                return said
            error = "an empty answer"
        except OSError as caught:
            error = str(caught)
        if time.monotonic() > deadline:
            sys.exit(f"FAILED: {told(host, port)} should answer, and does not within {patience:.0f} s: {error}")
        time.sleep(0.2)


def stays_silent(host: str, port: int) -> None:
    deadline = time.monotonic() + SILENCE
    while time.monotonic() < deadline:
        try:
            ask(host, port)
        except TimeoutError:
            continue
        except OSError as error:
            sys.exit(f"FAILED: {told(host, port)} should be silent, and refuses, which no policy does: {error}")
        sys.exit(
            f"FAILED: {told(host, port)} answers, although no policy allows it: the server's node does not enforce"
        )


def told(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def main(role: str) -> None:
    if role == "serve":
        serve()
        return
    addresses = until_it_answers(os.environ["SERVICE"], OPEN, PATIENCE).split(",")
    for host in addresses:
        until_it_answers(host, OPEN, PATIENCE)
        if role == "allowed":
            until_it_answers(host, JUDGED, PATIENCE)
            print(f"ok: {told(host, JUDGED)} answers, as the policy allows", flush=True)
        else:
            stays_silent(host, JUDGED)
            until_it_answers(host, OPEN, TRY)
            print(f"ok: {told(host, JUDGED)} is silent, as no policy allows it; {told(host, OPEN)} answers", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
