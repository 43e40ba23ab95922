"""Pure core: from API objects to the desired state of one node. No I/O, no clock, no logging."""
