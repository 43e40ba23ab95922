"""No window: while one state replaces another, no packet passes that both deny, and none is lost that both allow."""
