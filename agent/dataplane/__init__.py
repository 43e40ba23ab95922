"""Thin shell around the kernel: ipset, iptables, conntrack. One writer."""
