// Shows the samples that the choices name. Without it, all are shown.
"use strict";
(() => {
  const form = document.getElementById("filter");
  if (!form) return;
  const samples = [...document.querySelectorAll(".sample")];
  const texts = new Map(samples.map((sample) => [sample, sample.textContent.toLowerCase()]));
  const told = document.getElementById("told");

  function apply() {
    const { stage, task, verdict, cut, text } = form.elements;
    const words = text.value.trim().toLowerCase();
    let shown = 0;
    for (const sample of samples) {
      const { dataset } = sample;
      const fits = (!stage.value || dataset.stage === stage.value) && (!task.value || dataset.task === task.value)
        && (!verdict.value || dataset.verdict === verdict.value) && (!cut.value || dataset.cut === cut.value)
        && (!words || texts.get(sample).includes(words));
      sample.hidden = !fits;
      shown += fits;
    }
    for (const group of document.querySelectorAll(".samples")) {
      group.hidden = !group.querySelector(".sample:not([hidden])");
    }
    told.textContent = `${shown} of ${samples.length} answers shown`;
  }

  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));
  document.getElementById("open").addEventListener("click", () => {
    const visible = samples.filter((sample) => !sample.hidden);
    const open = visible.some((sample) => !sample.open);
    for (const sample of visible) sample.open = open;
  });
  form.hidden = false;
  apply();
})();
