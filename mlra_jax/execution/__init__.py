"""How steps run on devices: data sheets, planner and roofline, ahead-of-time compilation, collectives."""
