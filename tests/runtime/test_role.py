"""Roles of one component, and of many."""

import pytest

from diffsynth.errors import MissingComponent
from diffsynth.runtime.role import Role, fill_roles, grouped, member_roles, members, role_of

ROLES = {"dit": Role(architectures=("net",)), "controlnet": Role(architectures=("control",), optional=True, many=True)}


@pytest.mark.parametrize(("given", "held"), [("a", ("a",)), (["a", "b"], ("a", "b")), ((), None), (None, None)])
def test_a_role_of_many_holds_a_tuple(given, held):
    assert fill_roles(ROLES, {"dit": "net", "controlnet": given}, pipeline_name="P") == {
        "dit": "net",
        "controlnet": held,
    }


def test_members_are_components_of_their_own():
    components = {"dit": "net", "controlnet": ("a", "b"), "vae": None}
    flat = {"dit": "net", "controlnet[0]": "a", "controlnet[1]": "b", "vae": None}
    assert members(components) == flat
    assert grouped(flat) == components
    assert member_roles(["vae", "controlnet", "controlnet[1]"], components) == (
        "vae", "controlnet[0]", "controlnet[1]", "controlnet[1]"
    )  # fmt: skip
    assert role_of("controlnet[1]") == "controlnet"
    assert role_of("dit") == "dit"


def test_a_role_is_missing_or_unknown():
    with pytest.raises(MissingComponent, match="P needs dit"):
        fill_roles(ROLES, {}, pipeline_name="P")
    with pytest.raises(TypeError, match="no role 'controlnets'; did you mean 'controlnet'"):
        fill_roles(ROLES, {"dit": 1, "controlnets": 2}, pipeline_name="P")
