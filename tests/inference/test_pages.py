"""Pages: none belongs to two that differ, none is lost, what is known is what it says."""

import random

from bigmac_jax.inference.pages import Lease, Pages


def test_equal_beginnings_share_pages() -> None:
    pages = Pages(8, 4)
    first = pages.begin(list(range(10)), 12)
    assert first and first.ready == 0 and len(first.pages) == 3 and pages.in_use == 3
    pages.filled(first, range(10))
    second = pages.begin([*range(8), 99], 12)
    assert second and second.ready == 8 and second.pages[:2] == first.pages[:2] and second.pages[2] != first.pages[2]
    assert pages.in_use == 4
    third = pages.begin(list(range(8)), 8)  # its last token has to be computed
    assert third and third.ready == 4
    for lease in (first, second, third):
        pages.end(lease)
    assert pages.in_use == 0 and pages.available == 8
    again = pages.begin(list(range(10)), 10)
    assert again and again.ready == 8


def test_too_few_pages_change_nothing() -> None:
    pages = Pages(4, 2)
    held = pages.begin([1, 2, 3], 6)
    assert held and pages.begin([1], 4) is None and pages.available == 1
    pages.filled(held, [1, 2, 3])
    pages.end(held)
    assert pages.begin([1, 2, 3], 10) is None  # the known page doesn't count twice
    assert pages.begin([1, 2, 3], 8)


def test_the_page_that_was_used_longest_ago_goes_first() -> None:
    pages = Pages(3, 2)
    for tokens in ([1, 1], [2, 2], [3, 3]):
        lease = pages.begin([*tokens], 2)
        assert lease
        pages.filled(lease, tokens)
        pages.end(lease)
    assert len(pages.matching([1, 1, 0])) == 1
    lease = pages.begin([1, 1, 0], 2)  # used again
    assert lease
    pages.end(lease)
    assert pages.begin([9], 2)
    assert [len(pages.matching([v, v, 0])) for v in (1, 2, 3)] == [1, 0, 1]


def test_what_follows_a_page_that_is_there_twice_stays_unknown() -> None:
    """Its place may be another's later, and what followed it would be found behind that."""
    pages = Pages(8, 2)
    first, second = (pages.begin([1, 1, 2, 2, 9], 5) for _ in range(2))
    assert first and second
    pages.filled(first, [1, 1, 2, 2, 9])
    pages.filled(second, [1, 1, 2, 2, 9])
    place = second.pages[0]
    pages.end(second)
    other = pages.begin([3, 3, 9], 3)
    assert other and place == other.pages[0]
    pages.filled(other, [3, 3, 9])
    assert pages.matching([3, 3, 2, 2, 9]) == [place] and pages.matching([1, 1, 2, 2, 9]) == first.pages[:2]


def test_random_use() -> None:
    """Of each page the tokens up to its end are written down beside: what it holds depends on all of them."""
    for seed in range(20):
        draw, number = random.Random(seed), (12, 40)[seed % 2]
        pages = Pages(number, 2)
        content: dict[int, list[int]] = {}
        held: list[tuple[Lease, list[int]]] = []
        for _ in range(1000):
            if held and draw.random() < 0.3:  # it has read more, what another may have read meanwhile
                lease, tokens = draw.choice(held)
                pages.filled(lease, tokens)
            elif held and draw.random() < 0.5:
                lease, tokens = held.pop(draw.randrange(len(held)))
                for i, page in enumerate(lease.pages[: len(tokens) // 2]):
                    assert content[page] == tokens[: 2 * i + 2]
                pages.end(lease)
            else:
                tokens = [draw.randrange(2) for _ in range(draw.randint(1, 9))]
                begun = pages.begin(tokens, len(tokens) + draw.randrange(3))
                if begun is None:
                    continue
                assert begun.ready < len(tokens)
                for i, page in enumerate(begun.pages[: begun.ready // 2]):
                    assert content[page] == tokens[: 2 * i + 2]
                for i in range(begun.ready // 2, len(begun.pages)):
                    content[begun.pages[i]] = tokens[: 2 * i + 2]
                pages.filled(begun, tokens[: draw.randint(begun.ready, len(tokens))])
                held.append((begun, tokens))
            users = {page for lease, _ in held for page in lease.pages}
            assert pages.in_use == len(users) and pages.in_use + pages.available == number
        for lease, _ in held:
            pages.end(lease)
        assert pages.available == number
        assert len(pages._by_key) == len(pages._key_of) <= number
