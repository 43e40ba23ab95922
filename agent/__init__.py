"""netpol-agent: enforces Kubernetes NetworkPolicy with iptables and ipset, on one node."""

__version__ = "0.1.0"
