"""What a piece of work costs SQLite, without a clock."""


def steps(conn, work):
    """How many instructions of its machine SQLite takes for `work`: time, but exact."""
    taken = [0]

    def count():
        taken[0] += 1

    raw = conn.connection.driver_connection
    raw.set_progress_handler(count, 1)
    work()
    raw.set_progress_handler(None, 0)
    return taken[0]
