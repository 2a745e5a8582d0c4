"""How a step is run on the devices at hand: their data sheets, the planner and its roofline, compiled programs."""
