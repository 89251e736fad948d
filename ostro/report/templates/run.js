"use strict";
// Everything is readable without this: it only says the values under the pointer.
const tip = document.querySelector(".tip");

function tell(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const right = event.clientX + 14 + width > innerWidth - 8;
  const x = Math.max(8, right ? event.clientX - 14 - width : event.clientX + 14);
  const y = Math.min(Math.max(8, event.clientY - height - 10), innerHeight - height - 8);
  tip.style.transform = `translate(${x}px, ${y}px)`;
}

for (const plot of document.querySelectorAll(".plot")) {
  const points = JSON.parse(plot.querySelector("script").textContent);
  const cursor = plot.querySelector(".cursor");
  const mark = plot.querySelector(".mark");
  const show = (isShown) => { cursor.hidden = mark.hidden = tip.hidden = !isShown; };
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width;
    let low = 0, high = points.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if ((points[middle][0] + points[middle + 1][0]) / 2 < at) low = middle + 1; else high = middle;
    }
    const [x, y, where, lines] = points[low];
    show(true);
    cursor.style.left = mark.style.left = `${100 * x}%`;
    mark.style.top = `${100 * Math.min(1, Math.max(0, y))}%`;
    tell(event, [where, ...lines].join("\n"));
  });
  plot.addEventListener("pointerleave", () => show(false));
}

const held = document.getElementById("loads");
if (held) {
  const { steps, loads } = JSON.parse(held.textContent);
  const [numLayers, numExperts] = [loads[0].length, loads[0][0].length];
  for (const image of document.querySelectorAll(".heat")) {
    image.addEventListener("pointermove", (event) => {
      const box = image.getBoundingClientRect();
      const part = (n, offset, whole) => Math.min(n - 1, Math.max(0, Math.floor(n * offset / whole)));
      const across = (n) => part(n, event.clientX - box.left, box.width);
      const down = (n) => part(n, event.clientY - box.top, box.height);
      const isLayer = "layer" in image.dataset;
      const time = isLayer ? across(steps.length) : Number(image.dataset.moment);
      const layer = isLayer ? Number(image.dataset.layer) : down(numLayers);
      const expert = isLayer ? down(numExperts) : across(numExperts);
      tell(event, `step ${steps[time].toLocaleString("en")}\nlayer ${layer}, expert ${expert}\n${loads[time][layer][expert]}× an even share`);
    });
    image.addEventListener("pointerleave", () => { tip.hidden = true; });
  }
}
