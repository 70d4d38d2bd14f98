"""The course's own machinery: places, notebooks, doctor, widgets, exercises."""
