"use strict";
const experts = JSON.parse(document.getElementById("routing").textContent);
const tip = document.querySelector(".tip");
const slider = document.getElementById("layer");
const buttons = [...document.querySelectorAll("button[data-expert]")];
const texts = [...document.querySelectorAll(".text")];
let chosen = null;

function paint() {
  const layer = Number(slider.value);
  document.getElementById("said").textContent = layer;
  texts.forEach((text, domain) => {
    text.classList.toggle("alone", chosen !== null);
    for (const span of text.children) {
      const expert = experts[domain][layer][span.dataset.t][0];
      span.className = `e${expert}${expert === chosen ? " on" : ""}`;
    }
  });
  for (const button of buttons) button.setAttribute("aria-pressed", Number(button.dataset.expert) === chosen);
}

slider.addEventListener("input", paint);
for (const button of buttons) {
  button.addEventListener("click", () => {
    const expert = Number(button.dataset.expert);
    chosen = chosen === expert ? null : expert;
    paint();
  });
}
texts.forEach((text, domain) => {
  text.addEventListener("pointermove", (event) => {
    const token = event.target.dataset.t;
    tip.hidden = token === undefined;
    if (tip.hidden) return;
    tip.textContent = `layer ${slider.value}\nexperts ${experts[domain][slider.value][token].join(", then ")}`;
    const { width, height } = tip.getBoundingClientRect();
    const x = Math.min(event.clientX + 12, innerWidth - width - 8);
    tip.style.transform = `translate(${x}px, ${Math.max(8, event.clientY - height - 12)}px)`;
  });
  text.addEventListener("pointerleave", () => { tip.hidden = true; });
});
paint();
