"use strict";
(() => {
  // What a mark has to say is shown beside the pointer.
  const tip = document.getElementById("tip");
  document.addEventListener("pointermove", (event) => {
    const target = event.target instanceof Element ? event.target : null;
    const mark = target && target.closest("[data-t]");
    tip.hidden = !mark;
    if (!mark) return;
    tip.textContent = mark.getAttribute("data-t");
    const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    tip.style.left = Math.max(left, 4) + "px";
    tip.style.top = Math.min(event.clientY + 16, innerHeight - 36) + "px";
  });

  // The bars of one state: how much it depends on each time step before it.
  for (const box of document.querySelectorAll(".memory")) {
    const strip = box.querySelector(".strip");
    const found = box.querySelector(".found");
    const { length, rows } = JSON.parse(box.querySelector("script").textContent);
    const bars = rows[0].values.map(() => strip.appendChild(document.createElement("i")));
    let shown = rows.length - 1;

    const show = (place) => {
      shown = Math.max(0, Math.min(rows.length - 1, place));
      const { seed, values, text } = rows[shown];
      const at = Math.floor((seed * bars.length) / length);
      bars.forEach((bar, i) => {
        const decades = values[i] > 0 ? Math.max(Math.log10(values[i]), -6) : -6;
        bar.style.height = i > at ? "1px" : 100 * (1 + decades / 6) + "%";
        bar.className = i === at ? "at" : i > at ? "off" : "";
      });
      found.textContent = text;
      strip.setAttribute("aria-valuenow", String(seed));
      strip.setAttribute("aria-valuetext", text);
    };

    strip.addEventListener("pointermove", (event) => {
      const area = strip.getBoundingClientRect();
      const step = ((event.clientX - area.left) / area.width) * length;
      const place = rows.findIndex((row) => row.seed + 1 >= step);
      show(place < 0 ? rows.length - 1 : place);
    });
    strip.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 };
      const ends = { Home: 0, End: rows.length - 1 };
      if (event.key in moves) show(shown + moves[event.key]);
      else if (event.key in ends) show(ends[event.key]);
      else return;
      event.preventDefault();
    });
    show(shown);
  }
})();
