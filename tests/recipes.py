"""Scenarios A to D as data: the tutorials people follow, with verdicts written by hand.

They are cases like those of `upstream`, each with pods of its own. `outside` is a host outside the cluster;
`addresses` must hold one entry for it. ICMP probes mean ICMPv6 between IPv6 addresses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.upstream import Addresses, Case, Object, PolicySource, Probe, Reachability, Step, policy

OUTSIDE = "outside"

Labels = Mapping[str, str]


def _labelled(**labels: str) -> Object:
    return {"matchLabels": labels}


def _reach(pods: Mapping[str, Labels]) -> Reachability:
    return Reachability((*pods, OUTSIDE))


DEFAULT_NAMESPACES: Mapping[str, Labels] = {
    "default": {},
    "prod": {"purpose": "production"},
    "dev": {"purpose": "testing"},
    "other": {"team": "operations"},
}


def _step(
    pods: Mapping[str, Labels],
    given: Sequence[PolicySource],
    *probes: tuple[str, int | None, Reachability],
    namespaces: Mapping[str, Labels] = DEFAULT_NAMESPACES,
) -> Step:
    ports = {80} | {port for _, port, _ in probes if port is not None}
    return Step(
        policies=tuple(given),
        probes=tuple(Probe(*probe) for probe in probes),
        namespaces=namespaces,
        pods=pods,
        ports=tuple(sorted(ports)),
    )


# ---------------------------------------------------------------- D: the recipes

WEB: Mapping[str, Labels] = {
    "default/web": {"app": "web"},
    "default/client": {},
    "default/foo": {"app": "foo"},
    "prod/client": {},
    "dev/client": {"app": "web"},
}
ANY = _reach(WEB)
DENY_WEB = ANY.expect_all_ingress("default/web", False)
NOBODY_INTO_DEFAULT = ANY.expect("*", "default/*", False)

APP_WEB, APP_FOO = _labelled(app="web"), _labelled(app="foo")

WEB_DENY_ALL = policy("default/web-deny-all", {"podSelector": APP_WEB, "ingress": []})
DEFAULT_DENY_ALL = policy("default/default-deny-all", {"podSelector": {}, "ingress": []})
WEB_ALLOW_ALL = policy("default/web-allow-all", {"podSelector": APP_WEB, "ingress": [{}]})
DNS_PORTS = {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}

BOOKSTORE: Mapping[str, Labels] = {
    "default/apiserver": {"app": "bookstore", "role": "api"},
    "default/frontend": {"app": "bookstore", "role": "frontend"},
    "default/test": {},
    "prod/frontend": {"app": "bookstore", "role": "frontend"},
}

MONITORING: Mapping[str, Labels] = {
    "default/web": {"app": "web"},
    "default/plain": {},
    "default/monitor": {"type": "monitoring"},
    "other/plain": {},
    "other/monitor": {"type": "monitoring"},
    "dev/monitor": {"type": "monitoring"},
}

APISERVER: Mapping[str, Labels] = {
    "default/apiserver": {"app": "apiserver"},
    "default/plain": {},
    "default/monitor": {"role": "monitoring"},
    "other/monitor": {"role": "monitoring"},
}

REDIS: Mapping[str, Labels] = {
    "default/db": {"app": "bookstore", "role": "db"},
    "default/search": {"app": "bookstore", "role": "search"},
    "default/api": {"app": "bookstore", "role": "api"},
    "default/catalog": {"app": "inventory", "role": "web"},
    "default/half": {"app": "inventory", "role": "api"},
    "default/other": {"app": "other"},
    "prod/search": {"app": "bookstore", "role": "search"},
}


def _clients_only(addresses: Addresses) -> Object:
    """The web server for everyone but the pods: every address without theirs."""
    held = [address for ref, many in addresses.items() if ref != OUTSIDE for address in many]
    v4 = {"cidr": "0.0.0.0/0", "except": [f"{address}/32" for address in held if ":" not in address]}
    v6 = {"cidr": "::/0", "except": [f"{address}/128" for address in held if ":" in address]}
    spec = {"podSelector": APP_WEB, "ingress": [{"from": [{"ipBlock": v4}, {"ipBlock": v6}]}]}
    return policy("default/web-allow-external", spec)


def _web(given: Sequence[PolicySource], expected: Reachability) -> Step:
    """TCP 80 among the usual pods."""
    return _step(WEB, given, ("TCP", 80, expected))


def _web_from(name: str, *peers: Object) -> Object:
    return policy(f"default/{name}", {"podSelector": APP_WEB, "ingress": [{"from": list(peers)}]})


def _external_clients() -> tuple[Step, ...]:
    port_80 = policy("default/web-allow-external", {"podSelector": APP_WEB, "ingress": [{"ports": [{"port": 80}]}]})
    to_web = NOBODY_INTO_DEFAULT.expect_all_ingress("default/web", True)
    return (
        _web([DEFAULT_DENY_ALL], NOBODY_INTO_DEFAULT),
        _step(WEB, [DEFAULT_DENY_ALL, WEB_ALLOW_ALL], ("TCP", 80, to_web), ("TCP", 8080, to_web)),
        _step(WEB, [DEFAULT_DENY_ALL, port_80], ("TCP", 80, to_web), ("TCP", 8080, NOBODY_INTO_DEFAULT)),
        _web([DEFAULT_DENY_ALL, _clients_only], NOBODY_INTO_DEFAULT.expect(OUTSIDE, "default/web", True)),
    )


def _one_port() -> tuple[Step, ...]:
    closed = _reach(APISERVER).expect_all_ingress("default/apiserver", False)
    monitored = closed.expect("default/monitor", "default/apiserver", True)

    def step(port: int | str) -> Step:
        rule = {"ports": [{"port": port}], "from": [{"podSelector": _labelled(role="monitoring")}]}
        spec = {"podSelector": _labelled(app="apiserver"), "ingress": [rule]}
        probes = (("TCP", 5000, monitored), ("TCP", 8000, closed), ("UDP", 5000, closed))
        return _step(APISERVER, [policy("default/api-allow-5000", spec)], *probes)

    return step(5000), step("serve-5000-tcp")


def _several_selectors() -> tuple[Step, ...]:
    callers = (("bookstore", "search"), ("bookstore", "api"), ("inventory", "web"))
    rule = {"from": [{"podSelector": _labelled(app=app, role=role)} for app, role in callers]}
    spec = {"podSelector": _labelled(app="bookstore", role="db"), "ingress": [rule]}
    expected = _reach(REDIS).expect_all_ingress("default/db", False)
    for caller in ("search", "api", "catalog"):
        expected = expected.expect(f"default/{caller}", "default/db", True)
    return (_step(REDIS, [policy("default/redis-allow-services", spec)], ("TCP", 6379, expected)),)


def _egress_of(target: Object, *rules: Object) -> Object:
    spec = {"podSelector": target, "policyTypes": ["Egress"], "egress": list(rules)}
    return policy("default/foo-deny-egress", spec)


FOO_CLOSED = ANY.expect_all_egress("default/foo", False)

RECIPES: tuple[Case, ...] = (
    Case(1, "deny all to an application", "TCP", (_web([], ANY), _web([WEB_DENY_ALL], DENY_WEB))),
    Case(
        2,
        "limit to one application",
        "TCP",
        (
            _step(
                BOOKSTORE,
                [
                    policy(
                        "default/api-allow",
                        {
                            "podSelector": _labelled(app="bookstore", role="api"),
                            "ingress": [{"from": [{"podSelector": _labelled(app="bookstore")}]}],
                        },
                    )
                ],
                (
                    "TCP",
                    80,
                    _reach(BOOKSTORE)
                    .expect_all_ingress("default/apiserver", False)
                    .expect("default/frontend", "default/apiserver", True),
                ),
            ),
        ),
    ),
    Case(
        3,
        "allow all to one",
        "TCP",
        (_web([WEB_DENY_ALL], DENY_WEB), _web([WEB_DENY_ALL, WEB_ALLOW_ALL], ANY)),
    ),
    Case(4, "deny all in a namespace", "TCP", (_web([DEFAULT_DENY_ALL], NOBODY_INTO_DEFAULT),)),
    Case(
        5,
        "deny from other namespaces",
        "TCP",
        (
            _web(
                [
                    policy(
                        "default/deny-from-other-namespaces",
                        {"podSelector": {"matchLabels": None}, "ingress": [{"from": [{"podSelector": {}}]}]},
                    )
                ],
                NOBODY_INTO_DEFAULT.expect("default/*", "default/*", True),
            ),
        ),
    ),
    Case(
        6,
        "allow all namespaces",
        "TCP",
        (
            _web(
                [_web_from("web-allow-all-namespaces", {"namespaceSelector": {}})],
                ANY.expect(OUTSIDE, "default/web", False),
            ),
        ),
    ),
    Case(
        7,
        "allow one namespace",
        "TCP",
        (
            _web(
                [_web_from("web-allow-prod", {"namespaceSelector": _labelled(purpose="production")})],
                DENY_WEB.expect("prod/*", "default/web", True),
            ),
        ),
    ),
    Case(
        8,
        "allow some pods of another namespace",
        "TCP",
        (
            _step(
                MONITORING,
                [
                    _web_from(
                        "web-allow-all-ns-monitoring",
                        {
                            "namespaceSelector": _labelled(team="operations"),
                            "podSelector": _labelled(type="monitoring"),
                        },
                    )
                ],
                (
                    "TCP",
                    80,
                    _reach(MONITORING)
                    .expect_all_ingress("default/web", False)
                    .expect("other/monitor", "default/web", True),
                ),
            ),
        ),
    ),
    Case(9, "from external clients only", "TCP", _external_clients()),
    Case(10, "one port only", "TCP", _one_port()),
    Case(11, "several selectors", "TCP", _several_selectors()),
    Case(
        12,
        "deny egress of an application",
        "TCP",
        (
            _step(WEB, [_egress_of(APP_FOO)], ("TCP", 80, FOO_CLOSED), ("UDP", 53, FOO_CLOSED)),
            _step(
                WEB,
                [_egress_of(APP_FOO, DNS_PORTS)],
                ("TCP", 80, FOO_CLOSED),
                ("UDP", 53, ANY),
                ("TCP", 53, ANY),
                ("ICMP", None, FOO_CLOSED),
            ),
        ),
    ),
    Case(
        13,
        "deny all egress of a namespace",
        "TCP",
        (
            _step(
                WEB,
                [_egress_of({})],
                ("TCP", 80, ANY.expect("default/*", "*", False)),
                ("UDP", 53, ANY.expect("default/*", "*", False)),
            ),
        ),
    ),
    Case(
        14,
        "limit egress to the cluster",
        "TCP",
        (
            _step(
                WEB,
                [_egress_of(APP_FOO, DNS_PORTS, {"to": [{"namespaceSelector": {}}]})],
                ("TCP", 80, ANY.expect("default/foo", OUTSIDE, False)),
                ("UDP", 53, ANY),
            ),
        ),
    ),
)


# ---------------------------------------------------------------- A: three tiers

TIERS: Mapping[str, Labels] = {
    "shop/db": {"app": "db"},
    "shop/api": {"app": "api"},
    "shop/web": {"app": "web"},
    "shop/curl": {},
    "shop/curl-db": {"app": "db"},
    "shop/curl-api": {"app": "api"},
    "shop/curl-web": {"app": "web"},
    "kube-system/dns": {"k8s-app": "kube-dns"},
}
TIERS_OPEN = _reach(TIERS)
TIERS_CLOSED = TIERS_OPEN.expect("*", "shop/*", False).expect("shop/*", "*", False)

TO_DNS = {
    "to": [
        {
            "namespaceSelector": _labelled(name="kube-system"),
            "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
        }
    ],
    "ports": [{"protocol": "UDP", "port": 53}],
}
DENY_ALL = policy("shop/deny-all", {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]})
DB_NETPOL = policy(
    "shop/db-netpol",
    {
        "podSelector": _labelled(app="db"),
        "policyTypes": ["Ingress"],
        "ingress": [
            {
                "from": [{"podSelector": _labelled(app="api")}],
                "ports": [{"protocol": "TCP", "port": 5984}],
            }
        ],
    },
)
API_NETPOL = policy(
    "shop/api-netpol",
    {
        "podSelector": _labelled(app="api"),
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            {
                "from": [{"podSelector": _labelled(app="web")}],
                "ports": [{"protocol": "TCP", "port": 3000}],
            }
        ],
        "egress": [
            {"to": [{"podSelector": _labelled(app="db")}], "ports": [{"protocol": "TCP", "port": 5984}]},
            TO_DNS,
        ],
    },
)
WEB_NETPOL = policy(
    "shop/web-netpol",
    {
        "podSelector": _labelled(app="web"),
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": [], "ports": [{"protocol": "TCP", "port": 80}]}],
        "egress": [
            {"to": [{"podSelector": _labelled(app="api")}], "ports": [{"protocol": "TCP", "port": 3000}]},
            TO_DNS,
        ],
    },
)

API_TO_DB = TIERS_CLOSED.expect("shop/*api", "shop/*db", True)
WEB_TO_API = TIERS_CLOSED.expect("shop/*web", "shop/*api", True)
API_TO_DNS = TIERS_CLOSED.expect("shop/*api", "kube-system/dns", True)
API_AND_WEB_TO_DNS = API_TO_DNS.expect("shop/*web", "kube-system/dns", True)
ANYONE_TO_WEB = TIERS_CLOSED.expect(OUTSIDE, "shop/*web", True).expect("kube-system/dns", "shop/*web", True)


def _tiers(
    given: Sequence[Object],
    *,
    http: Reachability = TIERS_CLOSED,
    api: Reachability = TIERS_CLOSED,
    couch: Reachability = TIERS_CLOSED,
    dns: Reachability = TIERS_CLOSED,
    labelled: bool = True,
) -> Step:
    return _step(
        TIERS,
        given,
        ("TCP", 80, http),
        ("TCP", 3000, api),
        ("TCP", 5984, couch),
        ("UDP", 53, dns),
        ("TCP", 15984, TIERS_OPEN if not given else TIERS_CLOSED),
        namespaces={"shop": {}, "kube-system": {"name": "kube-system"} if labelled else {}},
    )


THREE_TIERS = Case(
    1,
    "three tiers, egress and DNS",
    "TCP",
    (
        _tiers([], http=TIERS_OPEN, api=TIERS_OPEN, couch=TIERS_OPEN, dns=TIERS_OPEN),
        _tiers([DENY_ALL]),
        _tiers([DENY_ALL, DB_NETPOL]),
        _tiers([DENY_ALL, DB_NETPOL, API_NETPOL], couch=API_TO_DB, labelled=False),
        _tiers([DENY_ALL, DB_NETPOL, API_NETPOL], couch=API_TO_DB, dns=API_TO_DNS),
        _tiers(
            [DENY_ALL, DB_NETPOL, API_NETPOL, WEB_NETPOL],
            http=ANYONE_TO_WEB,
            api=WEB_TO_API,
            couch=API_TO_DB,
            dns=API_AND_WEB_TO_DNS,
        ),
    ),
)


# ---------------------------------------------------------------- B: three namespaces

APPS: Mapping[str, Labels] = {f"app-{i}/{name}": {"app": f"app-{i}"} for i in (1, 2, 3) for name in "ab"}
APPS_OPEN = _reach(APPS)
PRODUCTION = {"environment": "production"}

APP_POLICIES = (
    policy("app-3/deny-all", {"podSelector": {}, "policyTypes": ["Ingress"]}),
    policy(
        "app-2/allow-production",
        {"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {"matchLabels": PRODUCTION}}]}]},
    ),
    policy("app-1/allow-same-namespace", {"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}]}]}),
)
APPS_CLOSED = APPS_OPEN.expect_all_ingress("app-*", False).expect("app-1/*", "app-1/*", True)


def _apps(given: Sequence[Object], expected: Reachability, *production: str) -> Step:
    return _step(
        APPS,
        given,
        ("ICMP", None, expected),
        ("TCP", 80, expected),
        namespaces={f"app-{i}": PRODUCTION if f"app-{i}" in production else {} for i in (1, 2, 3)},
    )


THREE_NAMESPACES = Case(
    2,
    "three namespaces, ingress only, ping and TCP",
    "ICMP",
    (
        _apps((), APPS_OPEN, "app-1", "app-2"),
        _apps(
            APP_POLICIES,
            APPS_CLOSED.expect("app-1/*", "app-2/*", True).expect("app-2/*", "app-2/*", True),
            "app-1",
            "app-2",
        ),
        _apps(APP_POLICIES, APPS_CLOSED.expect("app-*", "app-2/*", True), "app-1", "app-2", "app-3"),
        _apps(APP_POLICIES, APPS_CLOSED.expect("app-3/*", "app-2/*", True), "app-3"),
    ),
)


# ---------------------------------------------------------------- C: client and server by label

DEMO_POLICY = policy(
    "demo/demo-policy",
    {
        "podSelector": _labelled(app="server"),
        "ingress": [
            {
                "from": [{"podSelector": _labelled(app="client")}],
                "ports": [{"port": 80, "protocol": "TCP"}],
            }
        ],
    },
)


def _demo(given: Sequence[Object], connected: bool, *, outside: bool = False, **labels: str) -> Step:
    pods: Mapping[str, Labels] = {"demo/server": {"app": "server"}, "demo/client": labels}
    expected = _reach(pods).expect("demo/client", "demo/server", connected)
    return _step(pods, given, ("TCP", 80, expected.expect(OUTSIDE, "demo/server", outside)), namespaces={"demo": {}})


CLIENT_AND_SERVER = Case(
    3,
    "client and server by label",
    "TCP",
    (
        _demo((), True, outside=True),
        _demo((DEMO_POLICY,), False),
        _demo((DEMO_POLICY,), True, app="client"),
    ),
)

SCENARIOS = (THREE_TIERS, THREE_NAMESPACES, CLIENT_AND_SERVER)
