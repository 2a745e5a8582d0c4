"""How often a program's exchanges between devices are executed, from its text."""

import pytest

from mlra_jax.execution.collectives import Collective, executed_collectives

GROUPS = "replica_groups=[2,4]<=[8], use_global_device_ids=true"
PROGRAM = f"""HloModule jit_step, entry_computation_layout={{()->f32[]}}

%sum (a: f32[], b: f32[]) -> f32[] {{
  ROOT %add = f32[] add(%a, %b)
}}

%all-reduce-scatter.1 (p: bf16[64,32]) -> bf16[16,32] {{
  %all-reduce.9 = bf16[64,32]{{1,0}} all-reduce(%p), {GROUPS}, to_apply=%sum
  ROOT %slice = bf16[16,32]{{1,0}} dynamic-slice(%all-reduce.9, %i)
}}

%start (p: bf16[8,32]) -> bf16[32,32] {{
  %all-gather.1 = bf16[32,32]{{1,0:T(8,128)}} all-gather(%p), {GROUPS}, frontend_attributes={{chain_id="0"}}
}}

%done (p: bf16[8,32]) -> bf16[32,32] {{
  %all-gather.2 = bf16[32,32]{{1,0:T(8,128)}} all-gather(%p), {GROUPS}, frontend_attributes={{chain_id="0"}}
}}

%layer (state: (s32[], bf16[8,32])) -> (s32[], bf16[8,32]) {{
  %f = bf16[32,32]{{1,0}} fusion(%x), kind=kCustom, calls=%done
  %g = bf16[16,32]{{1,0:T(8,128)}} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1, metadata={{}}
  %h = (bf16[2,32]{{1,0}}, bf16[8,32]{{1,0}}, u32[], u32[]) all-gather-start(%z), {GROUPS}
}}

%more (state: (s32[], bf16[8,32])) -> pred[] {{
  %bound = s32[]{{:T(128)}} constant(24)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}}

%micro (state: (s32[], bf16[8,32])) -> (s32[], bf16[8,32]) {{
  %first = bf16[32,32]{{1,0}} fusion(%x), kind=kCustom, calls=%start
  %w = (s32[], bf16[8,32]) while(%state), condition=%more, body=%layer
  %r = f32[]{{:T(128)}} all-reduce(%loss), {GROUPS}, to_apply=%sum
}}

ENTRY %main (p: bf16[8,32]) -> f32[] {{
  %w2 = (s32[], bf16[8,32]) while(%p), condition=%x, body=%micro, backend_config={{"known_trip_count":{{"n":"3"}}}}
  %alone = f32[] all-reduce(%a), replica_groups=[8,1]<=[8], to_apply=%sum
}}
"""


def test_what_loops_call_counts_as_often_as_they_go_round():
    square, slice_, part = (("bf16", (rows, 32)) for rows in (32, 16, 8))
    assert executed_collectives(PROGRAM) == {
        Collective("all-gather", 4, (square,)): 72,  # cut in two steps: once for each of 24 layers, 3 times
        Collective("reduce-scatter", 4, (slice_,)): 72,
        Collective("all-gather", 4, (part,)): 72,  # asynchronous: the operand is not counted
        Collective("all-reduce", 4, (("f32", ()),)): 3,
    }


def program(*lines):
    return "\n".join(["ENTRY %main () -> f32[] {", *lines, "}"])


def test_every_way_to_name_the_devices_is_read():
    hlo = program(
        "  %a = f32[8,3]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add",
        "  %b = bf16[4,6]{1,0:T(8,128)} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={1}",
        "  %c = f32[2]{0} reduce-scatter(%x), replica_groups=mesh['a'=2,'b'=3,'c'=5] {'a','c'}, dimensions={0}",
        "  ROOT %d = (f32[4]{0}, s32[]) all-reduce(%x, %y), replica_groups={{0,1,2}}, to_apply=%add",
        "  %e = u8[7]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}",
        "  %f = f32[9]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add",
        "  %h = ((bf16[16,3]{1,0}), bf16[16,3]{1,0}) all-reduce-start(%x), replica_groups=mesh['a'=4] {'a'}",
        '  %g = f32[9]{0} add(%a, %all-reduce.3), metadata={op_name="all-reduce"}',
    )
    executed = executed_collectives(hlo)
    assert list(executed) == [
        Collective("all-reduce", 2, (("f32", (8, 3)),)),
        Collective("all-gather", 4, (("bf16", (4, 6)),)),
        Collective("reduce-scatter", 10, (("f32", (2,)),)),
        Collective("all-reduce", 3, (("f32", (4,)), ("s32", ()))),
        Collective("collective-permute", 4, (("u8", (7,)),)),
        Collective("all-reduce", 4, (("bf16", (16, 3)),)),
    ]
    assert set(executed.values()) == {1}
    assert [c.bytes for c in executed] == [96, 48, 80, 20, 7, 96]


def test_replica_groups_in_an_unknown_form_are_not_guessed():
    with pytest.raises(NotImplementedError, match="replica groups"):
        executed_collectives(program("  %r = f32[] all-reduce(%a), replica_groups=new"))
