// Cards and strips: their buttons name a picture. Sliders: the line follows the handle.
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-pick]');
  if (button) trigger('pick', {number: Number(button.dataset.pick)});
});
element.addEventListener('input', (event) => {
  const slider = event.target.closest('.k-slider');
  if (slider) slider.style.setProperty('--at', event.target.value + '%');
});
