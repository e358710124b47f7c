"""Bin packing, apart from everything that needs torch: a report counts rows without it."""


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Pack items into as few rows as best-fit-decreasing finds (Johnson 1973: 11/9 of the optimum).

    Returns:
        For each row the indices of its items. The number of rows depends on the lengths alone, not
        on their order; among items of equal length the earlier goes first.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free tokens → rows
    rooms = 0  # bit n is set where a row has n free tokens
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        with_room.setdefault(room - length, []).append(row)
        rooms |= 1 << (room - length)
    return rows
