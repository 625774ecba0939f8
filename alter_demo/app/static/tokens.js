// Appended to xray.js: draws the value of a token X-ray, and every new one.
const show = () => drawXray(element.querySelector('.xray-root'), props.value || {});
show();
watch('value', show);
