"""What the lab says that policies ask for, where only packets can tell: a Service that picks among its endpoints."""

from __future__ import annotations

from dataclasses import replace

from agent.lab.matrix import ask, questions
from tests.lab.world import needs_root
from tests.packets.scene import Scene, everywhere, isolate, service

pytestmark = needs_root


def test_a_denied_endpoint_that_answers_is_a_difference() -> None:
    """b is closed and c is open, both are behind the Service: who answers is what counts."""

    def body(scene: Scene) -> None:
        scene.services(service("web", 1, "x/b", "x/c"))
        scene.enforce(isolate("b", ingress=[]))
        staged = replace(scene.stage, services=scene.specs)
        asked = questions(staged, scene.fabric, ports=[("TCP", 80)], ends=["x/a", "svc/x/web"]) * 30
        asked = [question for question in asked if question.protocol == "TCP"]

        def answers() -> set[tuple[bool, str | None, bool | None, bool]]:
            found = ask(scene.fabric, scene.lab.expectation(staged), asked)
            return {(answer.reached, answer.who, answer.expected, answer.mismatch) for answer in found}

        if (found := answers()) != {(True, "x/c", None, False), (False, None, None, False)}:
            scene.wrong.append(f"{scene.step}: {found}")
        for version in (4, 6):
            scene.tool("node:node-1", version, "-I", "FORWARD", "-j", "ACCEPT")
        if (found := answers()) != {(True, "x/c", None, False), (True, "x/b", None, True)}:
            scene.wrong.append(f"{scene.step}, overruled: {found}")

    everywhere(body)
