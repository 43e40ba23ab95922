"""The lab: a node and its pods on this machine, as network namespaces."""
